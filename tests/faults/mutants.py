"""Seeded bugs that the suite has to catch: `python -m tests.faults.mutants`, `--only NAME`, `--jobs N`.

Each bug is one replacement in a copy of the tree, and names the tests that are meant to fail with it. One that survives
is a hole in the suite, one whose text is no longer in the source has rotted; both make the exit code 1, as does a test
that fails without any bug.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = (".venv", ".git", "runs", "wandb", "__pycache__", ".cache", ".*_cache", ".hypothesis")
LIMIT_SECONDS = 300
ALL_PASSED, SOME_FAILED = 0, 1  # exit codes of pytest; others say that it could not test


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest

    def apply(self, tree: Path) -> None:
        """Raises ValueError where the text does not stand in the file exactly once."""
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {count} times: {self.old}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


LOOP, GROUP, FILES = "train_full_sft.py", "trainer_utils.py", "training/checkpoints/store.py"
RESUME = "tests/test_resume.py::test_a_killed_and_resumed_run_ends_with_the_same_bits"
PLAIN, HALF, TWO, SHARED = (f"{RESUME}[{case}]" for case in (
    "1-float32-1-ddp", "1-float16-1-ddp", "2-float32-3-ddp", "3-float32-1-fsdp",
))  # fmt: skip
STAGED = "tests/test_staged_runs.py::test_a_resume_at_any_step_ends_with_the_same_bits"
SKIPPING = "tests/test_order.py::test_skipping_costs_exactly_the_named_batches"
PURE = "tests/test_order.py::test_the_order_is_a_pure_function_of_seed_and_epoch"
ONCE = "tests/test_order.py::test_exactly_once_with_equal_shares"
MOVED = "tests/test_order.py::test_a_change_in_mid_epoch_repeats_and_leaves_out_nothing"
SPLITS = "tests/test_numbers.py::test_any_split_gives_the_same_update"
EXCHANGES = "tests/test_numbers.py::test_a_step_exchanges_gradients_once"
DRAWS = "tests/test_numbers.py::test_dropout_draws_anew_for_every_rank_step_and_micro_batch"
BATCH = "tests/test_rows.py::test_a_batch_is_known"
DAMAGE = "tests/test_checkpoints.py::test_damage_is_found_and_the_one_before_is_taken"
ON_DISK = "tests/test_checkpoints.py::test_everything_is_on_the_disk_before_the_name_and_the_name_before_the_end"
RETENTION = "tests/test_checkpoints.py::test_the_last_n_are_kept_and_nothing_temporary_stays"
BEST = "tests/test_checkpoints_script.py::test_the_last_and_the_best_survive_pruning_and_only_yes_deletes"
SCRIPT = "tests/test_train_script.py"
CONTROL = "tests/test_control.py"
ISOLATED = "tests/test_attention.py::test_one_document_has_no_influence_on_another"

MUTANTS = [
    Mutant("optimizer state not restored", "training/checkpoints/checkpointer.py",
           "in moments.shapes.items():", "in list(moments.shapes.items())[:0]:", (PLAIN,)),
    Mutant("loss scale not restored", LOOP,
           'scaler.load_state_dict(saved["scaler"])', 'saved["scaler"]', (HALF,)),
    Mutant("one row too many counts as trained", GROUP,
           "divmod(rows_done, self.window_rows)", "divmod(rows_done + 1, self.window_rows)", (MOVED,)),
    Mutant("one row too few counts as trained", GROUP,
           "divmod(rows_done, self.window_rows)", "divmod(max(0, rows_done - 1), self.window_rows)", (MOVED,)),
    Mutant("one batch too many is skipped", GROUP,
           "if skipped > self.skip_batches:", "if skipped > self.skip_batches + (self.skip_batches > 0):", (SKIPPING,)),
    Mutant("skipped windows are counted as batches", LOOP,
           "skip * micro_batches", "skip", (TWO,)),
    Mutant("the epoch does not change the order", GROUP,
           'derived_seed("order", self.seed, self.epoch)', 'derived_seed("order", self.seed)', (PURE,)),
    Mutant("seed and epoch are added", GROUP,
           'derived_seed("order", self.seed, self.epoch)', 'derived_seed("order", self.seed + self.epoch)', (PURE,)),
    Mutant("the last window of an epoch is dropped", GROUP,
           "range(0, len(order), self.window_rows)", "range(0, len(order) - self.window_rows + 1, self.window_rows)",
           (ONCE,)),
    Mutant("an uneven share is filled with rows again", GROUP,
           "yield from [-1] * (self.slots - len(mine))", "yield from order[: self.slots - len(mine)]", (ONCE,)),
    Mutant("the mean of means is trained", LOOP,
           "(processes.world_size / supervised)", '(1 / max(len(batch["targets"]), 1) / len(window))', (SPLITS,)),
    Mutant("the average over ranks is not undone", LOOP,
           "(processes.world_size / supervised)", "(1 / supervised)", (SPLITS,)),
    Mutant("gradients are exchanged with every micro-batch", LOOP,
           "enabled=micro == len(window) - 1", "enabled=True", (EXCHANGES,)),
    Mutant("the learning rate is one step late", LOOP,
           "plan.lr(step) * state.lr_factor", "plan.lr(max(step - 1, 1)) * state.lr_factor",
           ("tests/test_schedules.py::test_a_run_logs_the_closed_form_before_and_after_a_resume",)),
    Mutant("a gradient that is not finite is applied", LOOP,
           "if math.isfinite(norm):\n        scaler.step", "if True:\n        scaler.step",
           (f"{SCRIPT}::test_a_step_with_a_gradient_that_is_not_finite_changes_no_weight[1-float32]",)),
    Mutant("the gradient is clipped before its scale is taken off", LOOP,
           "    scaler.unscale_(optimizer)\n", "",
           (f"{SCRIPT}::test_half_precision_has_the_gradient_norm_of_float32",)),
    Mutant("all ranks drop the same", LOOP,
           "seed_everything(learner.seed, step, micro, processes.rank)", "seed_everything(learner.seed, step, micro)",
           (DRAWS,)),
    Mutant("every step drops the same", LOOP,
           "seed_everything(learner.seed, step, micro, processes.rank)",
           "seed_everything(learner.seed, micro, processes.rank)", (DRAWS,)),
    Mutant("validation is a mean of means", "training/run/evaluation.py",
           "            terms = learner.measure(model, batch)\n",
           "            terms = learner.measure(model, batch)\n"
           "            terms = {name: term / max(len(batch['targets']), 1) for name, term in terms.items()}\n"
           "            batch['targets'] = batch['targets'][:1]\n",
           (f"{SCRIPT}::test_rows_of_one_sample_have_the_losses_of_packed_ones",)),
    Mutant("validation that a stop cut off is lost", LOOP,
           "            if state.unfinished:", "            if False:",
           (f"{CONTROL}::test_a_stop_during_validation_loses_none_of_it[1]",)),
    Mutant("every rank goes on from the sums of all", "training/schedule/train_state.py",
           "Sums(total if is_main else dict.fromkeys(total, 0))", "Sums(total)",
           (f"{RESUME}[2-float32-3-fsdp]",)),
    Mutant("packed documents go on counting positions", "dataset/rows.py",
           "np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], lengths)", "np.arange(boundaries[-1])", (BATCH,)),
    Mutant("the loss mask is shifted by one", "dataset/rows.py",
           "ids[is_target], supervised[is_target]", "ids[is_target], supervised[is_input]", (BATCH,)),
    Mutant("fillers count as tokens", "dataset/rows.py",
           "for d in documents if d.sample != FILLER)", "for d in documents)", (BATCH,)),
    Mutant("attention goes across documents", "model/attention.py",
           "    longest = max(document_lengths)\n",
           "    document_lengths = [sum(document_lengths)]\n    longest = document_lengths[0]\n", (ISOLATED,)),
    Mutant("rename before manifest", FILES,
           "            os.rename(draft, final)\n            try:\n",
           "            (draft / MANIFEST).unlink()\n            os.rename(draft, final)\n"
           "            write_manifest(final, step, files, metrics or {})\n            try:\n", (ON_DISK,)),
    Mutant("the name of a checkpoint is not forced to the disk", FILES,
           "                fsync_path(self.directory)\n            except OSError:",
           "                pass\n            except OSError:", (ON_DISK,)),
    Mutant("weights are not forced to the disk", "training/checkpoints/tensor_files.py",
           "        os.fsync(file.fileno())\n", "", (ON_DISK,)),
    Mutant("hashes are not checked", "training/checkpoints/manifest.py",
           'if sha256_of(path) != entry["sha256"]:', "if False:", (DAMAGE,)),
    Mutant("sizes are not checked", "training/checkpoints/manifest.py",
           "if path.stat().st_size != size:", "if False:",
           ("tests/test_checkpoints.py::test_the_file_and_what_is_wrong_with_it_are_named",)),
    Mutant("damaged checkpoints end in a fresh start", FILES,
           "        if problems:\n", "        if False:\n",
           ("tests/test_checkpoints.py::test_if_all_are_damaged_nothing_starts_afresh_in_silence",)),
    Mutant("the newest checkpoints are deleted", FILES,
           "{*list(manifests)[-self.keep_last :]", "{*list(manifests)[: self.keep_last]", (RETENTION,)),
    Mutant("the worst checkpoints are kept", FILES,
           'sign = 1 if self.mode == "min" else -1', 'sign = -1 if self.mode == "min" else 1', (BEST,)),
    Mutant("two trainers may share a directory", "training/control/lock.py",
           "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
           ("tests/test_checkpoints.py::test_a_directory_can_be_held_by_one_process_only",)),
    Mutant("shards begin elsewhere when they do not divide evenly", GROUP,
           "rows = -(-tensor.shape[placement.dim] // tensor.device_mesh.size(axis))",
           "rows = tensor.shape[placement.dim] // tensor.device_mesh.size(axis)", (SHARED,)),
    Mutant("a tied weight is saved twice in a checkpoint", GROUP,
           "model.named_parameters(remove_duplicate=False)}\n    buffers",
           "model.named_parameters()}\n    buffers", (f"{SCRIPT}::test_a_checkpoint_holds_every_weight_once",)),
    Mutant("a tied weight is exported twice", "model/export.py",
           '{"lm_head.weight"} if config.tie_word_embeddings else set()', "set()",
           ("tests/test_export.py::test_a_tied_head_is_saved_once_and_half_precision_is_real",)),
    Mutant("long samples are cut without being asked", "dataset/prepare.py",
           'if len(sample.ids) > room and options.overlong != "truncate":', "if False:",
           ("tests/test_store.py::test_a_row_may_fill_the_window_exactly",)),
    Mutant("cut samples are not counted", "dataset/prepare.py",
           "fitting.append((_fit(sample, options), len(sample.ids)))",
           "fitting.append((_fit(sample, options), len(_fit(sample, options).ids)))",
           ("tests/test_store.py::test_truncation_cuts_the_end_and_keeps_a_supervised_token",)),
    Mutant("a command is obeyed again when its file is touched", "training/control/requests.py",
           "        if number == self.last_id:\n            return None\n", "",
           (f"{CONTROL}::test_each_command_is_obeyed_once",)),
    Mutant("what policies remember is not gone on with", "training/schedule/policies.py",
           "self.parts[name].load_state_dict(state.policies[name])", "pass", (STAGED,)),
    Mutant("the average of the weights begins anew on resume", LOOP,
           'if checkpoint and has_shards(checkpoint, "ema"):', "if False:", (STAGED,)),
    Mutant("the multiplier does not reach the learning rate", LOOP,
           "plan.lr(step) * state.lr_factor,", "plan.lr(step),", (STAGED,)),
    Mutant("a stage trains the rows of the one before", "dataset/epoch_rows.py",
           "bisect_right(self.starts, epoch) - 1", "max(0, bisect_right(self.starts, epoch) - 2)",
           ("tests/test_staged_runs.py::test_each_stage_trains_its_own_rows_at_its_own_rates",)),
    Mutant("loss weights are left out", "model/losses.py",
           "sum(weights.get(name, 1.0) * term for", "sum(1.0 * term for",
           ("tests/test_staged_runs.py::test_the_weights_of_terms_reach_the_gradient",)),
    Mutant("a restart goes on with the run that was to be overwritten", "training/run/directory.py",
           "== job_name())", ")",
           ("tests/test_start.py::test_a_restart_does_not_take_the_run_to_be_overwritten_for_its_own",)),
    Mutant("a restart overwrites its own run", "training/run/directory.py",
           "    if begun:\n", "    if False:\n",
           ("tests/test_start.py::test_a_restart_by_torchrun_does_not_overwrite_the_run_that_it_continues",)),
    Mutant("a process believes the answer to one of an earlier start", "training/control/meeting.py",
           '    while not (answer := read(f"answer {rank}")).startswith(own):',
           '    while not (answer := read(f"answer {rank}")):',
           ("tests/test_meeting.py::test_every_start_gets_one_name_of_its_own_whoever_comes_last",)),
    Mutant("what was cut off stays in TensorBoard", "training/records/sinks.py",
           "purge_step=first)", "purge_step=None)",
           ("tests/test_sinks.py::test_what_was_cut_off_is_gone_even_within_the_step_of_the_cut",)),
    Mutant("a pause counts in the time of its epoch", "training/records/run_log.py",
           "seconds if idle else 0.0", "0.0",
           ("tests/test_system_metrics.py::test_a_pause_is_neither_in_the_rates_nor_in_the_time_of_an_epoch",)),
    Mutant("a paused run is silent", "training/control/watchdog.py",
           "        self.on_beat()\n", "",
           ("tests/test_system_metrics.py::test_every_beat_of_a_running_loop_is_heard_of",)),
    Mutant("sharding is forgotten where memory is estimated", "training/diagnosis/machine.py",
           "if shared else 1", "if False else 1",
           ("tests/test_doctor.py::test_what_a_model_takes_is_what_it_holds",)),
    Mutant("the frozen base fills every checkpoint", "trainer_utils.py",
           'if getattr(model, "adapters", None):', "if False:",
           ("tests/test_lora.py::test_a_run_leaves_its_base_alone_and_a_model_with_its_adapters",)),
    Mutant("adapters are merged without their scale", "model/lora.py",
           " * (config.lora_alpha / config.r)", "",
           ("tests/test_lora.py::test_what_is_merged_is_rounded_once",)),
    Mutant("another base is not noticed on resume", "model/lora.py",
           'return f"{said} of base weights {self.digest}"', 'return f"{said} of base weights"',
           ("tests/test_lora.py::test_what_is_not_the_same_is_not_resumed",)),
]  # fmt: skip


def copy_tree(target: Path) -> Path:
    """All of the project that tests need, without what a machine has added."""
    return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_COPIED)))


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[int | None, str]:
    """Exit code of pytest, None at the time limit, and the end of what it said."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"no end within {LIMIT_SECONDS} seconds"
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-12:])


def judge(mutant: Mutant, work: Path) -> tuple[str, str]:
    """caught, or what else became of a mutant, and why."""
    tree = copy_tree(work / mutant.name.replace(" ", "-"))
    try:
        mutant.apply(tree)
        code, said = run_tests(tree, mutant.tests)
    except ValueError as error:
        return "ROTTEN", str(error)
    finally:
        shutil.rmtree(tree)
    if code == SOME_FAILED:
        return "caught", ""
    return ("SURVIVED", ", ".join(mutant.tests)) if code == ALL_PASSED else ("NOT TESTED", said)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutants", description="Seeds bugs, runs the tests.")
    parser.add_argument("--only", metavar="NAME", help="only the bugs whose name has this in it")
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count(), help="at once (default: one per core)")
    options = parser.parse_args(argv)
    mutants = [mutant for mutant in MUTANTS if (options.only or "") in mutant.name]
    if not mutants:
        parser.error(f"--only {options.only}: none of {', '.join(mutant.name for mutant in MUTANTS)}")
    started, verdicts = time.monotonic(), []

    def timed(mutant: Mutant) -> None:
        began = time.monotonic()
        verdict, reason = judge(mutant, Path(work))
        verdicts.append(verdict)
        print(f"{mutant.name:60} {verdict:10} {time.monotonic() - began:6.1f} s  {reason}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        tests = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
        code, said = run_tests(copy_tree(Path(work) / "without"), tests)
        if code != ALL_PASSED:
            print(f"the tests fail without any bug:\n{said}")
            return 1
        print(f"{'no bug':60} {'passes':10} {time.monotonic() - started:6.1f} s", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(timed, mutants))
    caught = verdicts.count("caught")
    print(f"{caught} of {len(mutants)} caught in {time.monotonic() - started:.0f} seconds")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
