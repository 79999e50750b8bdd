"""What only a CUDA device can show: its attention kernels, its arithmetic, and resumed == uninterrupted on it."""

import signal

import pytest
import torch

from tests.small_world import KillAtCall, log_of, result_of, resume_from, train, write_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

WIDER = {"device": "cuda", "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", count=48)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, rows, dtype, accumulation):
    flags = {**WIDER, "data_path": str(rows), "dtype": dtype, "accumulation_steps": accumulation}
    flags |= {"deterministic": True, "epochs": 3, "save_interval": "2"}
    assert train(1, tmp_path / "whole", **flags) == [0], log_of(tmp_path / "whole")
    kill = KillAtCall(call=3 * accumulation + 1)
    assert train(1, tmp_path / "cut", wrap_objective=kill, **flags) == [-signal.SIGKILL]
    assert train(1, tmp_path / "cut", from_resume="1", **flags) == [0], log_of(tmp_path / "cut")
    assert "resumed from" in log_of(tmp_path / "cut")
    assert result_of(tmp_path / "cut") == result_of(tmp_path / "whole")
    assert train(1, tmp_path / "other", **flags | {"seed": 8}) == [0]
    assert result_of(tmp_path / "other")["final"] != result_of(tmp_path / "whole")["final"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts_ends_with_the_same_bits(tmp_path, rows, dtype):
    flags = {**WIDER, "data_path": str(rows), "dtype": dtype, "deterministic": True, "use_moe": True}
    assert train(1, tmp_path / "whole", **flags) == [0], log_of(tmp_path / "whole")
    cut = resume_from(tmp_path / "whole", 5, tmp_path / "cut")
    assert train(1, cut, from_resume="1", **flags) == [0], log_of(cut)
    assert result_of(cut) == result_of(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_do_not_carry_bits_from_document_to_document(dtype):
    from tests.tiny_model import logits_of, pack, tiny, tokens

    decoder = tiny(num_experts=8, moe_intermediate_size=832, hidden_size=64).to("cuda", dtype)
    lengths, results = [3, 31, 7, 300], []
    for seed in range(6):
        batch = pack([tokens(length, seed if i == 1 else i) for i, length in enumerate(lengths)])
        batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        results.append(logits_of(decoder, batch).split([length - 1 for length in lengths]))
    for result in results[1:]:
        same = [torch.equal(a, b) for a, b in zip(results[0], result, strict=True)]
        assert same == [True, False, True, True]


def test_a_gpu_run_goes_on_from_a_cpu_checkpoint(tmp_path, rows):
    flags = {**WIDER, "data_path": str(rows), "dtype": "float32"}
    assert train(1, tmp_path / "cpu", **flags | {"device": "cpu"}) == [0]
    cut = resume_from(tmp_path / "cpu", 5, tmp_path / "cut")
    assert train(1, cut, from_resume="1", **flags) == [0], log_of(cut)

    def losses(run):
        return [r["train/loss"] for r in result_of(run)["records"] if r["kind"] == "train"]

    assert losses(cut)[:5] == losses(tmp_path / "cpu")[:5]
    assert losses(cut)[5:8] == pytest.approx(losses(tmp_path / "cpu")[5:8], abs=0.3)  # other dropout masks


def packed_batch(lengths, seed, vocab_size=64):
    """Documents of these lengths, every position supervised."""
    ids = torch.randint(0, vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "document_lengths": list(lengths),
        "supervised_positions": torch.arange(len(ids)),
        "targets": ids.roll(-1),
    }


def logits_of(model, batch, dtype):
    from training.device import to_device

    found = []

    def collect(logits, positions):
        found.append(logits.detach())
        return {"ce": logits.float().square().sum()}

    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        model(to_device(batch, torch.device("cuda")), collect)["ce"].backward()
    return torch.cat(found).float().cpu()


@pytest.fixture(scope="module")
def model():
    from model.decoder import DecoderConfig
    from model.loading import build_model

    shape = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return build_model(DecoderConfig(**shape, initializer_range=0.3), seed=0).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_documents_do_not_see_each_other(model, dtype):
    lengths = [70, 1, 33, 128, 5]
    batch = packed_batch(lengths, seed=0)
    touched = {**batch, "input_ids": torch.cat([(batch["input_ids"][:70] + 1) % 64, batch["input_ids"][70:]])}
    before, after = logits_of(model, batch, dtype), logits_of(model, touched, dtype)
    assert torch.equal(before[70:], after[70:]) and not torch.equal(before[:70], after[:70])
    merged = {**batch, "cu_seqlens": torch.tensor([0, 237], dtype=torch.int32), "document_lengths": [237]}
    assert not torch.equal(before[70:], logits_of(model, merged, dtype)[70:]), "negative control: one long document"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_kernel_of_half_precision_agrees_with_float32(model, dtype, tolerance):
    batch = packed_batch([70, 1, 33, 128, 5], seed=1)
    exact, half = logits_of(model, batch, torch.float32), logits_of(model, batch, dtype)
    assert (exact - half).norm() / exact.norm() < tolerance
