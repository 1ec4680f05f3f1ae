"""What of a conversation is scored, rows that are left out, and texts that a function makes."""

from __future__ import annotations

import pytest
from datasets import Dataset
from test_trainer_columns import PLAIN, prepare, scored, whole
from tiny_training import sft_config

from fused_losses.trainer import SFTTrainer, precompute_ref_logps

DIALOGUE = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "two"},
]
MARKED = (
    "{% for m in messages %}<{{ m['role'][0] }}>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }};{% endgeneration %}"
    "{% else %}{{ m['content'] }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
# As templates of reasoning models: thoughts before the last answer alone.
THINKING = (
    "{% for m in messages %}<{{ m['role'][0] }}>"
    "{% if loop.last and m['role'] == 'assistant' %}[think]{% endif %}{{ m['content'] }};"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
# As templates that end the text after the last answer.
ENDING = PLAIN.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
UNTOLD = PLAIN.replace(
    "{{ m['content'] }}",
    "{{ m['content'] | upper if m['role'] == 'assistant' and not loop.last else m['content'] }}",
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, "one;two;"),
        (MARKED, "one;two;"),
        (THINKING, "one;[think]two;"),
        (ENDING, "one;two;<eos>"),
        (PLAIN.replace("<a>{% endif", "<a>[think]{% endif"), "one;two;"),
    ],
    ids=["prefix", "marks", "thinking", "ending", "request"],
)
@pytest.mark.parametrize("asked", [None, True])
def test_every_turn_of_the_assistant_is_scored_to_its_end(template, expected, asked):
    made = prepare([{"messages": DIALOGUE}], template=template, assistant_only_loss=asked)[0]
    assert scored(made) == expected


def test_what_is_scored_of_messages_can_be_chosen():
    row = {"messages": DIALOGUE}
    everything = "<s>s;<u>q;<a>one;<u>more;<a>two;"
    assert scored(prepare([row], assistant_only_loss=False)[0]) == everything
    assert scored(prepare([row], completion_only_loss=False)[0]) == everything
    assert scored(prepare([row], completion_only_loss=True)[0]) == "two;"
    split = {"prompt": DIALOGUE[:2], "completion": DIALOGUE[2:]}
    assert scored(prepare([split])[0]) == "one;<u>more;<a>two;"
    assert scored(prepare([split], assistant_only_loss=True)[0]) == "one;two;"
    both = {"assistant_only_loss": True, "completion_only_loss": False}
    assert scored(prepare([{"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]}], **both)[0]) == (
        "one;two;"
    )


def test_a_token_that_the_request_and_the_answer_share_is_the_answers():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bc"}]
    template = PLAIN.replace("<{{ m['role'][0] }}>", "<{{ m['role'][0] }}").replace("<a>", "<a")
    # The tokenizer has one token for ab.
    assert scored(prepare([{"messages": turns}], template=template)[0]) == "abc;"


def test_a_tokenizer_without_offsets_tells_the_same(monkeypatch):
    expected = prepare([{"messages": DIALOGUE}], template=THINKING)[0]
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    assert prepare([{"messages": DIALOGUE}], template=THINKING)[0] == expected


def test_turns_that_cannot_be_told_are_refused_and_not_guessed():
    with pytest.raises(ValueError, match=r"message 2 be told.*assistant_only_loss=False"):
        prepare([{"messages": DIALOGUE}], template=UNTOLD)
    assert prepare([{"messages": DIALOGUE}], template=UNTOLD, assistant_only_loss=False)
    with pytest.raises(ValueError, match="the chat template refuses the messages: no"):
        prepare([{"messages": DIALOGUE}], template="{{ raise_exception('no') }}")


def test_marks_that_leave_out_the_end_of_a_turn_are_told_of(caplog):
    template = MARKED.replace(";{% endgeneration %}", "{% endgeneration %}<eos>")
    prepare([{"messages": DIALOGUE}], template=template)
    assert "leaves the token that ends a turn ('<eos>') outside" in caplog.text


def test_rows_that_cannot_be_learnt_from_are_left_out_with_their_count(caplog):
    rows = [
        {"prompt": "q", "completion": "r"},
        {"prompt": "q", "completion": ""},
        {"prompt": "qqqqqq", "completion": "r"},
        {"prompt": "", "completion": "s"},
    ]
    with pytest.raises(ValueError, match=r"row 1.*is empty.*\(drop_unlearnable_rows=True"):
        prepare(rows)
    made = prepare(rows, drop_unlearnable_rows=True, max_length=4)
    assert made["row"] == [0, 3]
    assert [scored(row) for row in made] == ["r<eos>", "s<eos>"]
    assert "2 of 4 rows left out, the first: train_dataset, row 1" in caplog.text
    pairs = [{"prompt": "q", "chosen": "r", "rejected": x} for x in ("s", "")]
    assert prepare(pairs, pairs=True, drop_unlearnable_rows=True)["row"] == [0]
    packed = {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8], "seq_lengths": [2, 2]}
    assert prepare([packed], drop_unlearnable_rows=True)["input_ids"] == [[7, 8]]
    with pytest.raises(ValueError, match=r"no row that can be learnt from; the first: .*row 0"):
        prepare([{"text": ""}], drop_unlearnable_rows=True)


def test_rows_that_are_wrong_are_not_left_out():
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        prepare([{"input_ids": [5, 999]}, {"input_ids": [5, 6]}], drop_unlearnable_rows=True)


def test_a_text_has_any_name_or_is_made_by_a_function(tmp_path):
    assert whole(prepare([{"body": "hey"}], dataset_text_field="body")[0]) == "hey<eos>"
    with pytest.raises(ValueError, match=r"'tools'.*give messages"):
        prepare([{"of_ids": "hey", "tools": "t"}], dataset_text_field="of_ids")
    with pytest.raises(ValueError, match="dataset_text_field='text'"):
        prepare([{"body": "hey"}])
    rows = [{"a": "x", "b": "y", "tools": "t"}]
    made = prepare(rows, formatting_func=lambda row: f"{row['a']}+{row['b']}")[0]
    assert scored(made) == "x+y<eos>"
    for options, row, said in (
        ({"completion_only_loss": True}, {"a": "x"}, "completion_only_loss=True: formatting_func"),
        ({"assistant_only_loss": True}, {"a": "x"}, "assistant_only_loss=True: formatting_func"),
        ({}, {"input_ids": [5, 6]}, "has input_ids already"),
        ({}, {"a": 3}, "formatting_func must return a text, got int"),
        ({}, {"a": "x", "images": ["y"]}, "'images'.*text alone"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare([row], formatting_func=lambda row: row["a"], **options)


def test_the_trainer_and_the_references_alone_prepare_alike(tmp_path):
    from tiny_training import llama, tokenizer

    config = sft_config(
        tmp_path,
        dataset_text_field="body",
        drop_unlearnable_rows=True,
        precompute_ref_log_probs=True,
    )
    options = {"formatting_func": lambda row: row["body"][::-1]}
    rows = Dataset.from_list([{"body": "hey"}, {"body": ""}])
    alone = precompute_ref_logps(llama(), rows, config, tokenizer(), **options)
    trainer = SFTTrainer(llama(), config, rows, None, tokenizer(), **options)
    assert whole(trainer.train_dataset[0]) == "yeh<eos>"
    assert trainer.train_dataset[:] == alone[:]
