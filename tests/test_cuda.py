"""Models, training and serving on a GPU, against results on the CPU."""

import json
import multiprocessing
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
from oracle import Case, attention, definition, error, make_inputs, plain, run
from rich.console import Console
from tiny_model import make_config, tokens

from lightning_attention import lightning_attention_commit, lightning_attention_step, lightning_attention_verify
from lightning_attention.inference import Engine, SamplingOptions, load, stream
from lightning_attention.models import LightningCache, LightningConfig, LightningForCausalLM
from lightning_attention.ops.chunked import CHUNK_SIZE
from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.corpus import PackedDataset
from lightning_attention.training.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

compiler_warnings = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:TensorFloat32 tensor cores", "ignore:The .grad attribute of a Tensor"
)

CASES = [
    Case(T=2 * CHUNK_SIZE + 3, K=64, V=64),
    Case(T=CHUNK_SIZE + 1, K=20, V=36, slope=None, scale=0.5),
    Case(T=CHUNK_SIZE + 70, slope=100.0),
    Case(T=0),
    Case(lengths=(3, 0, CHUNK_SIZE + 7, 1, 2 * CHUNK_SIZE)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_as_accurate_as_plain_pytorch(case, dtype):
    inputs = make_inputs(case, dtype)
    exact, baseline = run(definition, inputs.to(torch.float64)), run(plain, inputs)
    for name, value in run(attention(), inputs.on("cuda")).items():
        allowed = 2 * error(baseline[name], exact[name]) + torch.finfo(value.dtype).eps
        assert error(value.cpu(), exact[name]) <= allowed, name


@pytest.mark.parametrize("tokens", [1, 3])
def test_decoding_from_slots_equals_reference(tokens):
    inputs = make_inputs(Case(B=3, T=tokens))
    pool = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    indices, gpu, gpu_pool = torch.tensor([4, -1, 0]), inputs.on("cuda"), pool.cuda()
    slots = indices.cuda()
    o = lightning_attention_step(gpu.q, gpu.k, gpu.v, gpu.log_decay, state=gpu_pool, state_indices=slots)
    expected = lightning_attention_step(
        inputs.q, inputs.k, inputs.v, inputs.log_decay, state=pool, state_indices=indices, backend="reference"
    )
    assert error(o.cpu(), expected) < 1e-13
    assert error(gpu_pool.cpu(), pool) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cached_calls_equal_one_call(dtype):
    torch.manual_seed(0)
    model = LightningForCausalLM(make_config(positions="lrpe-d")).eval().cuda().to(dtype)
    ids, cache, logits = tokens(2, 150).cuda(), LightningCache(3), []
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for chunk in ids.split([100, 1, 1, 48], dim=1):
            logits.append(model(chunk, cache=cache).logits)
    difference = (torch.cat(logits, dim=1) - expected).float().norm() / expected.float().norm()
    assert difference < {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    assert model.get_buffer("model.layers.0.attention.decay.log_decay").dtype == torch.float32


@pytest.fixture
def default_device():
    """Create tensors on the GPU by default."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def test_engine_equals_generate_under_a_default_device(default_device):
    model = LightningForCausalLM(make_config(eos_token_id=None)).eval()
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    engine = Engine(model, max_requests=2, prefill_tokens=16)
    prompt = list(range(3, 30))
    engine.submit(prompt, SamplingOptions(max_new_tokens=8, temperature=0))
    answer = []
    while engine.has_work:
        answer += [output.token for output in engine.step()]
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert answer == ids[0, len(prompt) :].tolist()


def test_packed_dataset_stays_on_the_cpu_under_a_default_device(default_device):
    """Worker processes of a data loader read the data set."""
    starts = np.array([0, 3, 7, 11, 15])
    sequence = PackedDataset(np.array([5, 6, 2, 7, 8, 9, 2, 4] * 2), sequence_length=8, document_starts=starts)[1]
    assert {x.device.type for x in sequence.values()} == {"cpu"}
    assert sequence["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert sequence["labels"].tolist() == [-100, 6, 2, -100, 8, 9, 2, -100]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("parents", [None, [-1, 0, 0, 1]], ids=["chain", "tree"])
def test_verify_and_commit_equal_reference_under_a_default_device(default_device, device, parents):
    with torch.device("cpu"):
        inputs = make_inputs(Case(T=4), torch.float32)
        last = torch.tensor([3, 2])
        tree = None if parents is None else torch.tensor([parents] * 2)
    results = []
    for x, name in ((inputs.on(device), "auto"), (inputs.to(torch.float64), "reference")):
        options = {"state": x.state.clone(), "parents": None if tree is None else tree.to(x.q.device), "backend": name}
        o = lightning_attention_verify(x.q, x.k, x.v, x.log_decay, **options)
        lightning_attention_commit(x.k, x.v, x.log_decay, last=last.to(x.q.device), **options)
        assert o.device == x.q.device
        results.append((o.cpu(), options["state"].cpu()))
    for value, exact in zip(*results, strict=True):
        assert error(value, exact) < 1e-5


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_equals_the_cpu(num_beams):
    torch.manual_seed(1)
    model = LightningForCausalLM(make_config(eos_token_id=None)).eval()
    ids, mask = tokens(2, 7), torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    options = {"max_new_tokens": 15, "num_beams": num_beams, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.cuda().generate(ids.cuda(), attention_mask=mask.cuda(), **options).cpu(), expected)


@pytest.mark.parametrize("prefix_slots", [0, 8])
@pytest.mark.parametrize("kind", ["plain states", "decoding states", "invariant"])
def test_engine_equals_generate(prefix_slots, kind):
    """CUDA graphs of several sizes, with padding; requests arrive while others run."""
    torch.manual_seed(1)
    model = LightningForCausalLM(make_config(eos_token_id=None, invariant=kind == "invariant")).eval().cuda()
    options = SamplingOptions(max_new_tokens=30, temperature=0)
    ring = False if kind == "plain states" else None
    engine = Engine(model, max_requests=5, prefill_tokens=64, prefix_slots=prefix_slots, prefix_block=8, ring=ring)
    assert all(isinstance(states, torch.Tensor) == (kind == "plain states") for states in engine.pool.states)
    common, answers = tokens(40).tolist(), defaultdict(list)
    prompts = [common[: 7 * i] + tokens(1 + 5 * i, seed=i).tolist() for i in range(9)]
    for i, prompt in enumerate(prompts):
        assert engine.submit(prompt, options) == i
        for output in engine.step() if i % 2 else []:
            answers[output.request].append(output.token)
    while engine.has_work:
        for output in engine.step():
            answers[output.request].append(output.token)
    assert set(engine._decoder._graphs) <= {1, 2, 4, 5}
    assert engine._decoder._graphs
    for i, prompt in enumerate(prompts):
        ids = model.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=30, do_sample=False)
        assert answers[i] == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("invariant", [False, True])
def test_logprobs_of_an_engine_with_hopper_heads_are_those_of_a_forward_pass(invariant):
    """Layers with keys of 256, by the portable kernels, and of 128; products of the model are not invariant."""
    torch.manual_seed(0)
    config = make_config(hidden_size=256, num_attention_heads=2, eos_token_id=None, invariant=invariant)
    model = LightningForCausalLM(config).eval().cuda().bfloat16()
    engine = Engine(model, max_requests=3, prefill_tokens=100, prefix_slots=4, prefix_block=64)
    prompts = [tokens(n, seed=n).tolist() for n in (1, 63, 64, 130)]
    options = SamplingOptions(max_new_tokens=90, temperature=1.0, seed=0)
    found, logprobs = defaultdict(list), defaultdict(list)
    for prompt in prompts:
        engine.submit(prompt, options, stop_token_ids=[], logprobs=0)
    while engine.has_work:
        for output in engine.step():
            if output.token is not None:
                assert output.logprobs is not None
                found[output.request].append(output.token)
                logprobs[output.request].append(output.logprobs.chosen)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + found[i]], device="cuda")
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        expected = expected.gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs[i], device="cuda"), expected, atol=0.2, rtol=0.05)


@compiler_warnings
def test_compiled_gradients_equal_eager():
    torch.manual_seed(0)
    model = LightningForCausalLM(make_config()).cuda()
    ids = tokens(2, 150).cuda()
    losses = [m(ids, labels=ids, use_cache=False).loss for m in (model, torch.compile(model, fullgraph=True))]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@compiler_warnings
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compile"])
def test_training_lowers_the_loss_and_the_model_generates_text(tmp_path, compile):
    (tmp_path / "data.txt").write_text("".join(f"{i} times {j} is {i * j}\n" for i in range(40) for j in range(40)))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "model.json").write_text(json.dumps(sizes))
    options = TrainingOptions(
        tmp_path / "run",
        (tmp_path / "data.txt",),
        config=tmp_path / "model.json",
        sequence_length=256,
        steps=100,
        eval_tokens=1024,
        dtype="bfloat16",
        compile=compile,
    )
    train(options, console=Console(quiet=True))
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert losses[-1] < losses[0] - 1
    model, tokenizer = load(tmp_path / "run", bf16=True)
    assert model.device.type == "cuda"
    assert len("".join(stream(model, tokenizer, "3 times", SamplingOptions(max_new_tokens=20, seed=0)))) > 0


def test_two_processes_train_on_one_gpu():
    """The GPU switches between them in the middle of kernels."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2, timeout=300)
    shapes = [(32, 2048, 8), (128, 256, 4)]
    processes = [context.Process(target=_train_for_seconds, args=(10, ready, *shape)) for shape in shapes]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0, 0]


def _train_for_seconds(seconds, ready, batch_size, length, heads):
    sizes = {"num_hidden_layers": 8, "hidden_size": 64 * heads, "num_attention_heads": heads, "intermediate_size": 1408}
    model = LightningForCausalLM(LightningConfig(**sizes, vocab_size=32768)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(32768, (batch_size, length), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step()  # compiles
    torch.cuda.synchronize()
    ready.wait()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert step().isfinite()
