"""Each dataset format gives the right tokens and labels; bad rows are named with their cure."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny_training import V, tokenizer

from fused_losses.trainer.collate import Collator
from fused_losses.trainer.data import SIDES, Preparation

TOKENIZER = tokenizer()


def prepare(rows, pairs=False, **options):
    options = {"max_length": None, "truncation_mode": "keep_start"} | options
    preparation = Preparation(TOKENIZER, V, **options)
    read = preparation.pairs if pairs else preparation.sft
    return read(Dataset.from_list(rows), "train_dataset")[0]


def ids(text):
    return TOKENIZER(text)["input_ids"]


def scored(row, side=""):
    """The text whose tokens are scored."""
    labels = [y for y in row[f"{side}labels"] if y != -100]
    return "".join(TOKENIZER.convert_ids_to_tokens(labels))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "options", "whole", "completion"),
    [
        ({"text": "hey"}, {}, "hey<eos>", "hey<eos>"),
        ({"prompt": "2+2=", "completion": "4"}, {}, "2+2=4<eos>", "4<eos>"),
        (
            {"prompt": "2=", "completion": "4"},
            {"completion_only_loss": False},
            "2=4<eos>",
            "2=4<eos>",
        ),
        # The token ab begins in the prompt and ends in the completion.
        ({"prompt": "xa", "completion": "bc"}, {}, "xabc<eos>", "abc<eos>"),
        ({"messages": [user("q"), assistant("r")]}, {}, "<u>q\n<a>r\n", "r\n"),
        (
            {"messages": [user("q"), assistant("r")]},
            {"assistant_only_loss": False},
            "<u>q\n<a>r\n",
            "<u>q\n<a>r\n",
        ),
        (
            {"messages": [user("q"), assistant("r")]},
            {"completion_only_loss": True},
            "<u>q\n<a>r\n",
            "r\n",
        ),
        (
            {"prompt": [user("q")], "completion": [assistant("r")]},
            {},
            "<u>q\n<a>r\n",
            "r\n",
        ),
    ],
)
def test_text_and_messages_score_what_is_asked(row, options, whole, completion):
    made = prepare([row], **options)
    assert "".join(TOKENIZER.convert_ids_to_tokens(made["input_ids"])) == whole
    assert scored(made) == completion
    assert made["labels"][-1] == made["input_ids"][-1]


def test_tokenised_rows_keep_their_labels_or_masks():
    assert prepare([{"input_ids": [5, 6, 7]}])["labels"] == [5, 6, 7]
    assert prepare([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}])["labels"][1] == -100
    masked = prepare([{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 0]}])
    assert masked["labels"] == [-100, 6, -100]


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({"prompt": "q:", "chosen": "yes", "rejected": "no"}, "yes<eos>", "no<eos>"),
        ({"chosen": "q: yes", "rejected": "q: no"}, "yes<eos>", "no<eos>"),
        (
            {"prompt": [user("q")], "chosen": [assistant("y")], "rejected": [assistant("n")]},
            "y\n",
            "n\n",
        ),
        (
            {
                "chosen": [user("q"), assistant("y")],
                "rejected": [user("q"), assistant("n")],
            },
            "y\n",
            "n\n",
        ),
        (
            {
                "prompt_ids": ids("q:"),
                "chosen_ids": ids("yes"),
                "rejected_ids": ids("no"),
            },
            "yes",
            "no",
        ),
    ],
)
def test_pairs_score_the_responses(row, chosen, rejected):
    made = prepare([row], pairs=True)
    assert scored(made, "chosen_") == chosen
    assert scored(made, "rejected_") == rejected


def test_truncation_keeps_references_beside_their_tokens():
    row = {"input_ids": list(range(5, 13)), "ref_logps": [-float(i) for i in range(8)]}
    made = prepare([row], max_length=4)
    assert made["input_ids"] == [5, 6, 7, 8]
    assert made["ref_logps"] == [-0.0, -1.0, -2.0, -3.0]
    del row["ref_logps"]
    assert prepare([row], max_length=4, truncation_mode="keep_end")["input_ids"] == [9, 10, 11, 12]


GOOD = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"question": "q"}], {}, r"columns question; SFT needs one of: messages \| text"),
        ([GOOD, {"prompt": "q", "completion": ""}], {}, "row 1, column 'completion': is empty"),
        ([{"prompt": "q", "completion": [user("a")]}], {}, "must be of the prompt's kind"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], {}, "row 0.*'input_ids': has no token to s"),
        ([{"input_ids": [1, V]}], {}, rf"holds token id {V}, outside the model's vocabulary"),
        ([{"input_ids": [1, 2], "labels": [1]}], {}, "2 tokens and 1 labels"),
        (
            [{"prompt": "long", "completion": "x"}],
            {"max_length": 3},
            "max_length=3 of its 6",
        ),
        ([{"input_ids": [1, 2], "ref_logps": [0.0]}], {}, "2 tokens, 1 references"),
        ([{"text": "x"}], {"completion_only_loss": True}, "knows no prompt"),
        (
            [{"input_ids": [1, 2, 3], "ref_logps": [0.0] * 3}],
            {"max_length": 2, "truncation_mode": "keep_end"},
            "do not survive truncation_mode='keep_end'",
        ),
    ],
)
def test_bad_rows_are_named_with_their_cure(rows, options, said):
    with pytest.raises(ValueError, match=said):
        prepare(rows, **options)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q"}, "columns prompt; preference learning needs one of"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "row 0, column 'rejected': is empty"),
        ({"chosen": "same", "rejected": "same"}, "equals the other side"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [V]}, "outside the model's voc"),
    ],
)
def test_bad_pairs_are_named_with_their_cure(row, said):
    with pytest.raises(ValueError, match=said):
        prepare([row], pairs=True)


def test_a_list_of_rows_is_refused_by_name():
    with pytest.raises(TypeError, match=r"train_dataset must be a datasets\.Dataset, got list"):
        Preparation(None, V, None, "keep_start").sft([GOOD], "train_dataset")


def test_end_to_end_batches_never_let_a_label_cross_sequences():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "row": 0},
        {"input_ids": [8, 9], "labels": [8, 9], "row": 1},
    ]
    batch = Collator(("",), 0, padding_free=True)(rows)
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1]]


def test_end_to_end_pairs_point_from_each_scored_token_to_the_state_before_it():
    row = {
        "chosen_input_ids": [1, 2, 3],
        "chosen_labels": [-100, 2, 3],
        "rejected_input_ids": [1, 4],
        "rejected_labels": [-100, 4],
        "row": 0,
    }
    batch = Collator(SIDES, 0, padding_free=True)([row])
    assert batch["labels"].tolist() == [[2, 3], [4, -100]]
    counted = batch["labels"] != -100
    assert torch.equal(
        batch["input_ids"][0, batch["scored_by"] + 1][counted], batch["labels"][counted]
    )
