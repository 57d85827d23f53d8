import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_plugins.autodp.trainer import (
    RESULT,
    EvaluationError,
    TrainJob,
    answer_losses,
    evaluate,
    greedy_answers,
    prompt_rows,
    run_job,
)
from tests.hf_plugins.autodp.tiny import PAIRS, rows

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def job(tmp_path: Path, model_folder: Path) -> TrainJob:
    rows(PAIRS[:40]).save_to_disk(str(tmp_path / "rows"))
    rows(PAIRS[40:52]).save_to_disk(str(tmp_path / "questions"))
    return TrainJob(
        model=str(model_folder),
        rows=str(tmp_path / "rows"),
        questions=str(tmp_path / "questions"),
        out=str(tmp_path / "out"),
        num_steps=8,
        learning_rate=5e-3,
        batch_size=8,
        device_batch_size=4,
        max_length=64,
        lora_r=0,
        use_cpu=True,
    )


def test_rows_become_prompt_and_completion() -> None:
    turn = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "yes"}]
    table = rows(PAIRS[:1], history=[turn])
    question, answer = PAIRS[0]
    assert prompt_rows(table, template=False)[0] == {
        "prompt": f"before\nyes\n{question}\n",
        "completion": answer,
    }
    chat = prompt_rows(table, template=True)[0]
    assert chat["prompt"] == [*turn, {"role": "user", "content": question}]
    assert chat["completion"] == [{"role": "assistant", "content": answer}]


def test_losses_are_those_of_the_answers_alone(model_folder: Path) -> None:
    """Against one row at a time, without padding; a long question is cut from its front, never the answer."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    table = prompt_rows(rows([*PAIRS[:3], ("why " * 200, "because of it")]), template=False)
    found = answer_losses(model, tokenizer, table, 48)
    for row, loss in zip(table, found, strict=True):
        answer = tokenizer(row["completion"])["input_ids"]
        prompt = tokenizer(row["prompt"])["input_ids"][-(48 - len(answer)) :]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item()
        assert loss == pytest.approx(expected, abs=1e-4)


def test_answers_are_greedy_and_do_not_depend_on_the_batch(model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    table = prompt_rows(rows([*PAIRS[:3], ("short?", "x")]), template=True)
    together = greedy_answers(model, tokenizer, table, 6)
    assert together == greedy_answers(model, tokenizer, table, 6, batch_size=1)
    assert len(together) == 4


@pytest.mark.host
def test_training_lowers_the_loss_and_can_go_on(job: TrainJob) -> None:
    """A quarter, then the rest from its checkpoint, ends where the whole ends; LoRA trains too."""
    whole = run_job(job)
    assert whole["steps"] == 8
    assert json.loads((Path(job.out) / RESULT).read_text())["losses"] == whole["losses"]
    first = run_job(replace(job, out=job.out + "2", budget=0.25, keep=True))
    assert first["steps"] == 2
    rest = run_job(replace(job, out=job.out + "2", resume=True))
    assert rest["steps"] == 8
    assert rest["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    assert sum(whole["losses"]) < sum(first["losses"])
    lora = run_job(replace(job, out=job.out + "3", lora_r=4, num_steps=2, max_new_tokens=3))
    assert len(lora["answers"]) == len(lora["losses"]) == 12


@pytest.mark.host
def test_a_process_of_its_own_gives_the_same_result(job: TrainJob) -> None:
    short = replace(job, num_steps=2)
    alone = evaluate(short)
    inside = evaluate(replace(short, out=job.out + "2"), isolate=False)
    assert alone["losses"] == pytest.approx(inside["losses"], abs=1e-5)


def test_a_crash_is_told_with_its_log_after_a_second_try(
    job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho out of memory; exit 3\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    with pytest.raises(EvaluationError, match="failed twice with code 3; run it by hand") as caught:
        evaluate(job)
    assert str(caught.value).count("out of memory") == 2


def test_empty_answers_have_a_loss(model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    table: Dataset = prompt_rows(rows([("q", "")]), template=False)
    assert answer_losses(model, tokenizer, table, 16)[0] > 0
