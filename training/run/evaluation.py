"""Validation, of the moving averages too, and answers to held-out questions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from dataset.loader import batches_of
from dataset.questions import Question
from model.generate import generate
from model.language_model import Batch
from trainer_utils import reshard, unwrap
from training.control.requests import Wishes
from training.device import to_device
from training.records.run_log import RunRecords
from training.run.ema import Ema
from training.run.learner import Learner
from training.schedule.sums import Sums, add_to, evaluation_means
from training.schedule.train_state import LoopState


@torch.no_grad()
def validate(
    learner: Learner, loaders: dict[str, DataLoader[Any]], wishes: Wishes, prefix: str = "eval"
) -> dict[str, float]:
    """Means over every supervised token of the held-out data: summed over ranks first, divided once.

    Each source has a loader; where there are several, each has its own means besides those over all. Raises Stopped
    when a stop is wished, on all ranks at the same batch.
    """
    model, sums = unwrap(learner.model), {name: Sums() for name in ("", *loaders)}
    model.eval()
    for source, loader in loaders.items():
        for batch in batches_of(loader):
            wishes.stop_if_wished(learner.processes.sum_ints(wishes.look()))
            batch = to_device(batch, learner.processes.device)
            with learner.autocast():
                terms = learner.measure(model, batch)
            counts = {"supervised": len(batch["targets"]), "tokens": batch["num_tokens"]}
            add_to((sums[""], sums[source]), terms, **counts)
            learner.beat()
    model.train()
    results = evaluation_means(sums[""].total(learner.processes.sum_ints), prefix)
    for source in loaders if len(loaders) > 1 else ():
        results |= evaluation_means(sums[source].total(learner.processes.sum_ints), f"{prefix}/{source}")
    return results


@dataclass
class Evaluation:
    """Validation, of the moving averages too, and answers to held-out questions; every rank must call it."""

    learner: Learner
    loaders: dict[str, DataLoader[Any]]  # by source; without any, nothing is evaluated
    questions: list[Question]
    questions_interval: int  # in evaluations
    tokenizer: Any
    ema: Ema | None
    state: LoopState
    records: RunRecords

    @torch.no_grad()
    def names(self, filler: Batch) -> list[str]:
        """The names of what it will give, before anything is trained; `filler` is a batch that counts for nothing."""
        if not self.loaders:
            return []
        model, sources = self.learner.model, list(self.loaders) if len(self.loaders) > 1 else []
        with self.learner.autocast():
            terms = self.learner.measure(unwrap(model), filler)
        reshard(model)
        prefixes = ["eval", *(["eval/ema"] if self.ema else [])]
        prefixes += [f"{prefix}/{source}" for prefix in prefixes for source in sources]
        names = [name for prefix in prefixes for name in evaluation_means(dict.fromkeys(terms, 0), prefix)]
        return [*names, *(["eval/exact_match"] if self.questions else [])]

    def __call__(self, wishes: Wishes) -> dict[str, float]:
        if not self.loaders:
            return {}
        results = validate(self.learner, self.loaders, wishes)
        if self.ema:
            with self.ema.in_place():
                results |= validate(self.learner, self.loaders, wishes, "eval/ema")
        if self.questions and self.state.evaluations % self.questions_interval == 0:
            results |= self.answers()
        self.state.evaluations += 1
        self.records.log_eval(self.state, results)
        return results

    def answers(self) -> dict[str, float]:
        """Answer greedily, each rank its share of the questions; returns the share of exact answers."""
        processes, exact = self.learner.processes, 0
        for question in self.questions[processes.rank :: processes.world_size]:
            room, ends = len(question.expected) + 8, {question.end}
            model: Any = unwrap(self.learner.model)
            (answer,) = generate(model, [question.prompt], max_new_tokens=room, eos_token_ids=ends)
            exact += answer == question.expected
            texts = self.tokenizer.batch_decode([question.prompt, question.expected, answer])
            said = dict(zip(("prompt", "expected", "answer"), texts, strict=True))
            self.records.event(self.state.step, "sample", **said, exact=answer == question.expected)
            self.learner.beat()
        return {"eval/exact_match": processes.sum_ints([exact])[0] / len(self.questions)}
