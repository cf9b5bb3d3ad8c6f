"""Retention by EleutherAI's lm-evaluation-harness, on local files or on the harness's own tasks."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import random
from pathlib import Path
from typing import Any

from .real_data import read_rows

# File, what is asked and answered (the harness's templates), and the metric that is told. The forms are those of the
# harness's own tasks of these names; the files hold the finished texts.
TASKS: dict[str, dict[str, Any]] = {
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "target_delimiter": "",
        "metric": "acc",
    },
    "arc_easy": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric": "acc",
    },
    "piqa": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query.rstrip()}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric": "acc",
    },
    "winogrande": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",  # a number: the choices are contexts, and the target follows each of them
        "doc_to_target": "continuation",
        "doc_to_choice": "context_options",
        "metric": "acc",
    },
    "triviaqa": {
        "file": "triviaqa_sm_sub",
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{aliases}}",
        "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 16},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric": "exact_match",
        "metric_options": {"ignore_case": True, "ignore_punctuation": True},
    },
}


def _local_task(name: str, data: str, count: int) -> Any:
    """A task of the harness on a fixed sample of a local file."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = dict(TASKS[name])
    rows = read_rows(data, f"retention/{config.pop('file', name)}")
    sample = random.Random(0).sample(rows, min(count, len(rows)))
    metric, options = config.pop("metric"), config.pop("metric_options", {})
    config["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True, **options}]
    config |= {"task": name, "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1.0}}
    config["custom_dataset"] = lambda **_: {"test": Dataset.from_list(sample)}
    return ConfigurableTask(config=config)


@functools.cache
def _tasks(data: str | None, count: int) -> dict[str, Any]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells every task's options
    if data is not None:
        return {name: _local_task(name, data, count) for name in TASKS if _there(data, name)}
    from lm_eval.tasks import get_task_dict

    return get_task_dict(list(TASKS))


def _there(data: str, name: str) -> bool:
    return (Path(data) / "retention" / f"{TASKS[name].get('file', name)}.jsonl").is_file()


def harness_figures(model: Any, tokenizer: Any, data: str | None, count: int) -> dict[str, float]:
    """The metric of each task, by its name, and their mean as "tasks"; nothing where the count is 0 or nothing is
    there."""
    if not count or not _tasks(data, count):
        return {}
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    training = model.training
    with contextlib.redirect_stderr(io.StringIO()):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
        found = evaluate(lm, _tasks(data, count), limit=None if data else count, bootstrap_iters=0, log_samples=False)
    model.train(training)
    figures = {}
    for name in _tasks(data, count):
        metric = TASKS[name]["metric"]
        figures[name] = next(v for k, v in found["results"][name].items() if k.partition(",")[0] == metric)
    return {**figures, "tasks": sum(figures.values()) / len(figures)}
