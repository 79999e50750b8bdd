"""The data of a run."""

from typing import Any

from dataset.load import DataRequest, RunData, load_rows
from dataset.prepare import DataOptions
from model.build import template_hint
from training.config import Config
from training.config.stages import Stage


def load_data(config: Config, stages: list[Stage], tokenizer: Any, **how: Any) -> RunData:
    """The data of a run and its stages; `how` goes to dataset.load.load_rows."""
    requests = [
        (DataRequest(**each.config.data_request, options=DataOptions(**each.config.data_options)), each.epochs)
        for each in stages
    ]
    with template_hint():
        return load_rows(requests[0][0], tokenizer, stages=requests, **how)
