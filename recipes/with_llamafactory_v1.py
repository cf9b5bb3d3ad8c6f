"""A scored folder in LLaMA-Factory's v1 trainer (0.9.5), which weighs tokens by `loss_weights`.

    python recipes/with_llamafactory_v1.py config.yaml    # what `USE_V1=1 llamafactory-cli sft config.yaml` takes

Its loader takes messages alone and makes the weights from theirs, one a message. Two of its plugins take tokenised rows
past that: a converter of data sets and a template, both named `scored`. So the configuration says `template: scored`,
and `train_dataset` is a YAML file with

    scored: {path: /path/to/scored, converter: scored}
"""

from __future__ import annotations

import sys
from typing import Any

from llamafactory.v1.plugins.data_plugins.converter import DataConverterPlugin
from llamafactory.v1.plugins.model_plugins.rendering import RenderingPlugin
from llamafactory.v1.trainers.sft_trainer import run_sft


@DataConverterPlugin("scored").register()
def messages_of(row: dict[str, list[int]]) -> dict[str, Any]:
    """A row of `alphatoken score` as the one message in which v1 looks for data."""
    return {"messages": [{"role": "assistant", "content": [{"type": "tokens", "value": row}]}]}


@RenderingPlugin("scored").register("render_messages")
def row_of(processor: Any, messages: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
    """The row again, weight 1 where it has a label."""
    row = messages[0]["content"][0]["value"]
    return {**row, "loss_weights": [float(label != -100) for label in row["labels"]]}


def main(argv: list[str] | None = None) -> None:
    if argv is not None:
        sys.argv[1:] = argv  # where v1 reads its configuration
    run_sft()


if __name__ == "__main__":
    main()
