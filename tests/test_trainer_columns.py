"""No column is dropped in silence: each is read as it is meant, or refused by its name."""

from __future__ import annotations

import json
import logging

import pytest
import transformers
from datasets import Dataset
from tiny_training import V, tokenizer
from tokenizers import processors

from fused_losses.trainer.data import Preparation

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}
OTHER = {"role": "assistant", "content": "s"}
TURNS = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }};{% endfor %}"
PLAIN = TURNS + "{% if add_generation_prompt %}<a>{% endif %}"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}]


def prepare(rows, pairs=False, words=None, template=PLAIN, **options):
    words = words or tokenizer()
    if isinstance(words, transformers.PreTrainedTokenizerBase):
        words.chat_template = template
    options = {"max_length": None, "truncation_mode": "keep_start"} | options
    preparation = Preparation(words, V, **options)
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return (preparation.pairs if pairs else preparation.sft)(dataset, "train_dataset")


def text(ids):
    return "".join(tokenizer().convert_ids_to_tokens(ids))


def whole(row, side=""):
    return text(row[f"{side}input_ids"])


def scored(row, side=""):
    return text([y for y in row[f"{side}labels"] if y != -100])


FORMATS = {
    "messages": ({"messages": [ASK, ANSWER]}, False, ""),
    "prompt and completion": ({"prompt": [ASK], "completion": [ANSWER]}, False, ""),
    "pairs": ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]}, True, "chosen_"),
    "pairs that begin alike": (
        {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        True,
        "chosen_",
    ),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "json"])
def test_tools_and_template_arguments_reach_the_template(kind, tools):
    row, pairs, side = FORMATS[kind]
    row = row | {"tools": tools, "chat_template_kwargs": {"mode": "fast"}}
    template = "{{ tools|length }}{{ tools[0].function.name }}{{ mode }}:" + PLAIN
    made = prepare([row], pairs, template=template)[0]
    assert whole(made, side) == "1ffast:<u>q;<a>r;"
    assert scored(made, side) == "r;"


PAIR = {"prompt": "q", "chosen": "r", "rejected": "s"}
PAIR_IDS = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}


@pytest.mark.parametrize(
    ("row", "pairs", "said"),
    [
        ({"messages": [ASK, ANSWER], "images": ["a.png"]}, False, "'images'.*text alone"),
        ({"input_ids": [5, 6], "pixel_values": [0.5]}, False, "'pixel_values'.*text alone"),
        (PAIR | {"image": "a.png"}, True, "'image'.*text alone"),
        ({"text": "hey", "audio": "a.wav"}, False, "'audio'.*text alone"),
        ({"text": "hey", "tools": TOOLS}, False, "'tools'.*give messages"),
        (PAIR | {"chat_template_kwargs": {"a": 1}}, True, "'chat_template_kwargs'.*give messages"),
        ({"messages": [ASK, ANSWER], "attention_mask": [1]}, False, "'attention_mask'.*input_ids"),
        ({"prompt": "q", "completion": "r", "position_ids": [0]}, False, "'position_ids'"),
        ({"text": "hey", "assistant_masks": [1, 1, 1]}, False, "'assistant_masks'.*input_ids"),
        ({"input_ids": [5, 6], "loss_mask": [0, 1]}, False, "'loss_mask'.*not weighted"),
        (PAIR_IDS | {"seq_lengths": [2, 1]}, True, "'seq_lengths'"),
        (PAIR_IDS | {"chosen_attention_mask": [1, 0, 1]}, True, "'chosen_attention_mask'"),
        (PAIR | {"ref_chosen_logps": -3.0}, True, "'ref_chosen_logps'.*per token"),
        (PAIR | {"margin": 0.5}, True, "'margin'"),
    ],
)
def test_a_column_that_means_something_and_is_not_read_is_refused_by_name(row, pairs, said):
    with pytest.raises(ValueError, match=f"train_dataset has a column {said}"):
        prepare([row], pairs)


def test_columns_that_say_nothing_of_training_are_named_in_the_log(caplog):
    prepare([{"text": "hey", "source": "web", "id": 3}])
    assert "columns not read: id, source" in caplog.text


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]], ids=str)
def test_padding_that_a_mask_tells_of_is_taken_off_with_what_lies_beside_it(mask):
    ids = [9 + i if m else 0 for i, m in enumerate(mask)]
    row = {
        "input_ids": ids,
        "labels": [i or -100 for i in ids],
        "attention_mask": mask,
        "ref_logps": [-float(i) for i in ids],
    }
    made = prepare([row])[0]
    assert made["input_ids"] == made["labels"] == [i for i in ids if i]
    assert made["ref_logps"] == [-float(i) for i in ids if i]
    pair = {f"{side}_{k}": v for side in ("chosen", "rejected") for k, v in row.items()}
    made = prepare([pair], pairs=True)[0]
    assert made["rejected_input_ids"] == [i for i in ids if i]
    assert made["chosen_ref_logps"] == [-float(i) for i in ids if i]


@pytest.mark.parametrize(
    "told",
    [
        {"seq_lengths": [2, 3]},
        {"position_ids": [0, 1, 0, 1, 2]},
        {"seq_lengths": [2, 3], "position_ids": [0, 1, 0, 1, 2]},
    ],
    ids=lambda told: "+".join(told),
)
def test_a_packed_row_is_taken_apart_into_its_sequences(told):
    row = {"input_ids": [5, 6, 7, 8, 9], "ref_logps": [0.0, -1.0, 0.0, -2.0, -3.0]}
    made = prepare([row | told])
    assert made["input_ids"] == [[5, 6], [7, 8, 9]]
    assert made["ref_logps"] == [[0.0, -1.0], [0.0, -2.0, -3.0]]
    assert made["row"] == [0, 0]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"attention_mask": [1, 0, 1]}, "hides tokens between others"),
        ({"attention_mask": [1, 2, 2]}, "tells more than padding"),
        ({"attention_mask": [1, 1]}, "3 tokens and an attention_mask of 2"),
        ({"seq_lengths": [2, 2]}, "3 tokens and seq_lengths that sum to 4"),
        ({"position_ids": [0, 2, 4]}, "do not count up by one from 0"),
        ({"position_ids": [4, 5, 6]}, "do not count up by one from 0"),
        ({"position_ids": [0, 1, 0], "seq_lengths": [3]}, "tell different sequences"),
        ({"labels": [5, 6, 7], "completion_mask": [0, 1, 1]}, "labels and completion_mask"),
        ({"assistant_masks": [1, 1]}, "3 tokens and 2 entries of assistant_masks"),
    ],
)
def test_what_does_not_fit_the_tokens_is_refused(told, said):
    with pytest.raises(ValueError, match=said):
        prepare([{"input_ids": [5, 6, 7]} | told])


def test_masks_of_completion_and_assistant_hold_together():
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}
    assert prepare([row])[0]["labels"] == [-100, 6, -100]
    assert prepare([row], completion_only_loss=False)[0]["labels"] == [5, 6, -100]
    assert prepare([row], assistant_only_loss=False)[0]["labels"] == [-100, 6, 7]
    with pytest.raises(ValueError, match=r"assistant_only_loss=True: .* nor assistant_masks"):
        prepare([{"input_ids": [5, 6]}], assistant_only_loss=True)


def test_what_arrow_fills_with_none_never_reaches_the_text():
    template = (
        "{% for t in tools or [] %}{{ t.function.parameters|length }}{% endfor %}"
        "{% for m in messages %}<{{ m['role'][0] }}>{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments.keys()|join('+') }}{% endfor %}"
        "{% for p in m.content %}{{ p.keys()|join('+') }}{% endfor %};{% endfor %}"
    )

    def row(name, parameter):
        call = {"type": "function", "function": {"name": "f", "arguments": {name: 1}}}
        part = {"type": "text", "text": "a", f"{name}a": "y"}
        turn = {"role": "assistant", "content": [part], "tool_calls": [call]}
        tool = {"function": {"parameters": {parameter: {"type": "int"}}}}
        return {"messages": [{"role": "user", "content": [part]}, turn], "tools": [tool]}

    made = prepare([row("x", "c"), row("y", "d")], template=template)
    assert [whole(r) for r in made] == [
        f"1<u>text+type+{n}a;<a>{n}text+type+{n}a;".replace("text+type", "type+text")
        for n in ("x", "y")
    ]


def with_ends():
    """A tokenizer that puts a beginning and an end around a text by itself."""
    words = tokenizer()
    words.bos_token = "z"
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="z $A <eos>", special_tokens=[("z", words.bos_token_id), ("<eos>", 1)]
    )
    return words


@pytest.mark.parametrize("said", ["hey", "zhey", "hey<eos>", "zhey<eos>"])
def test_a_text_that_brings_its_beginning_or_end_gets_no_second(said):
    assert whole(prepare([{"text": said}], words=with_ends())[0]) == "zhey<eos>"
    head, tail = said[:2], said[2:]
    made = prepare([{"prompt": head, "completion": tail}], words=with_ends())[0]
    assert whole(made) == "zhey<eos>"
    assert scored(made) == tail.removesuffix("<eos>") + "<eos>"


CHANGED = "{% if add_generation_prompt or messages|length == 1 %}Q:{% else %}D:{% endif %}" + PLAIN


@pytest.mark.parametrize("kind", FORMATS)
def test_a_template_whose_prompt_does_not_begin_the_whole_is_refused(kind):
    row, pairs, _ = FORMATS[kind]
    with pytest.raises(ValueError, match="does not write the prompt as the beginning"):
        prepare([row], pairs, template=CHANGED)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_only_the_request_for_an_answer_writes_is_told_of(kind, caplog):
    row, pairs, side = FORMATS[kind]
    template = PLAIN.replace("<a>{% endif", "<a>[T]{% endif")
    made = prepare([row], pairs, template=template)[0]
    assert scored(made, side) == "r;"
    assert "ends the request for an answer with '[T]'" in caplog.text


def test_content_that_the_template_leaves_out_is_told_of(caplog):
    template = PLAIN.replace("{{ m['content'] }}", "{{ m['content'][0].text }}")
    prepare([{"messages": [ASK, ANSWER]}], template=template)
    assert "does not write the content of message 0" in caplog.text


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"prompt": [ASK], "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]}, True),
        ({"prompt": [ASK], "completion": [ASK, ANSWER]}, False),
    ],
)
def test_messages_that_repeat_the_prompt_are_not_given_it_twice(row, pairs):
    made = prepare([row], pairs)[0]
    side = "chosen_" if pairs else ""
    assert (whole(made, side), scored(made, side)) == ("<u>q;<a>r;", "r;")


def test_texts_that_all_repeat_their_prompt_are_not_given_it_twice(caplog):
    pairs = [{"prompt": "q:", "chosen": f"q:{a}", "rejected": f"q:{b}"} for a, b in ("yn", "no")]
    made = prepare(pairs, pairs=True)
    assert [whole(r, "chosen_") for r in made] == ["q:y<eos>", "q:n<eos>"]
    assert scored(made[0], "rejected_") == "n<eos>"
    assert "all responses begin with the text of their prompt" in caplog.text
    # Where one does not, the others begin so by their own will.
    made = prepare([*pairs, {"prompt": "q:", "chosen": "y", "rejected": "q:"}], pairs=True)
    assert whole(made[0], "chosen_") == "q:q:y<eos>"
    made = prepare([{"prompt": "2+2=", "completion": "2+2=4"}])[0]
    assert (whole(made), scored(made)) == ("2+2=4<eos>", "4<eos>")


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_a_dataset_of_any_format_is_read_as_it_is(kind):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [8, 9, 0], "labels": [8, 9, -100], "attention_mask": [1, 1, 0]},
    ]
    made = prepare(Dataset.from_list(rows).with_format(kind))
    assert made["input_ids"] == [[5, 6, 7], [8, 9]]
    assert made["labels"] == [[-100, 6, 7], [8, 9]]
    # Columns that the format hides stay hidden.
    hidden = Dataset.from_list(rows).with_format(kind, columns=["input_ids"])
    assert prepare(hidden)["labels"] == [[5, 6, 7], [8, 9, 0]]


def test_a_transform_is_refused():
    rows = Dataset.from_list([{"text": "hey"}]).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match=r"has a transform .*apply it with map"):
        prepare(rows)


def test_a_processor_reads_text_with_its_tokenizer():
    image = transformers.CLIPImageProcessor()
    processor = transformers.LlavaProcessor(image_processor=image, tokenizer=tokenizer())
    assert scored(prepare([{"prompt": "q", "completion": "r"}], words=processor)[0]) == "r<eos>"
    with pytest.raises(TypeError, match=r"tokenizer, or a processor that holds one, got CLIPImage"):
        prepare([{"text": "hey"}], words=image)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([ASK, ANSWER | {"weight": 0}], "role 'assistant' has weight=0, which is not read"),
        ([ASK, ANSWER | {"train": False}, ASK, ANSWER], "role 'assistant' has train=False"),
        (
            [
                {"role": "user", "content": [{"type": "image"}]},
                {"role": "assistant", "content": []},
            ],
            "message 0 holds content of type image",
        ),
        ([ASK, {"role": "model", "content": "r"}], "no message of the role 'assistant'.*model"),
    ],
)
def test_messages_that_ask_for_what_is_not_done_are_refused(turns, said):
    with pytest.raises(ValueError, match=f"row 0, column 'messages': .*{said}"):
        prepare([{"messages": turns}])


def test_a_message_that_is_not_scored_anyway_may_say_so():
    rows = [{"messages": [ASK | {"weight": 0}, ANSWER | {"weight": 1}]}]
    assert scored(prepare(rows)[0]) == "r;"
    with pytest.raises(ValueError, match="role 'user' has weight=0"):
        prepare(rows, assistant_only_loss=False)


def test_tools_that_the_template_does_not_write_are_refused():
    with pytest.raises(ValueError, match="the chat template does not write any"):
        prepare([{"messages": [ASK, ANSWER], "tools": TOOLS}])


@pytest.mark.parametrize(
    ("row", "pairs", "said"),
    [
        (
            {"prompt": "q", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
            True,
            "remove the column prompt",
        ),
        (
            {"prompt": "q", "chosen": [ANSWER], "rejected": [OTHER]},
            True,
            r"write the prompt as \[\{'role': 'user'",
        ),
        ({"prompt": [ASK], "completion": "r"}, False, r"write it as \[\{'role': 'assistant'"),
        ({"input_ids": [5, V]}, False, "resize_token_embeddings"),
        ({"input_ids": [5, 6], "labels": [5, V]}, False, "resize_token_embeddings"),
        ({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [V]}, True, "resize_token_emb"),
    ],
)
def test_errors_name_the_cure(row, pairs, said):
    with pytest.raises(ValueError, match=said):
        prepare([row], pairs)


def test_what_is_scored_is_said_with_its_share(caplog):
    caplog.set_level(logging.INFO)
    prepare([{"prompt": "qqq", "completion": "r"}] * 2)
    assert "train_dataset: 2 rows, 40.0% of 10 tokens scored: the completion" in caplog.text
    caplog.clear()
    caplog.set_level(logging.WARNING)
    prepare([{"messages": [ASK, ANSWER]}])
    assert "20.0% of 10 tokens scored: the assistant's turns" in caplog.text
    assert "assistant_only_loss=False scores every token" in caplog.text
