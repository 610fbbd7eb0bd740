"""Gluon on a CPU: what a kernel reads and writes, and how its partitions wait for each other.

Partitions are threads, tensors are PyTorch's. What a GPU may do late is done as late as can be: a product, or a store
of a box, when it is waited for. Copies into shared memory are done at once, as early as can be. Layouts, registers and
everything that is only fast are left out.
"""

import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TIMEOUT_SECONDS = 20


class Pointer:
    """Into the memory of a tensor; with an offset, or a block of them."""

    def __init__(self, tensor: Tensor, offset: Any = 0):
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.memory = torch.as_strided(tensor.detach(), (size,), (1,), 0)
        self.offset = offset + torch.tensor(tensor.storage_offset())
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        moved = object.__new__(Pointer)
        moved.__dict__ = self.__dict__ | {"offset": self.offset + offset}
        return moved

    def __sub__(self, offset: Any) -> "Pointer":
        return self + -offset


def load(p: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    if mask is None:
        return p.memory[checked(p, p.offset)]
    offset, mask = torch.broadcast_tensors(p.offset, mask)
    x = p.memory[checked(p, torch.where(mask, offset, 0))] if mask.any() else p.memory.new_zeros(())
    return torch.where(mask, x, torch.tensor(other, dtype=p.memory.dtype))


def store(p: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    offset, value = torch.broadcast_tensors(p.offset, value)
    mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand(offset.shape)
    p.memory[checked(p, offset[mask])] = value[mask].to(p.memory.dtype)


def checked(p: Pointer, offset: Tensor) -> Tensor:
    assert ((offset >= 0) & (offset < len(p.memory))).all(), "an address outside of a tensor"
    return offset


class Shared:
    """A block of shared memory, or a view of it. Fresh memory holds NaN."""

    def __init__(self, x: Tensor):
        self.x, self.dtype, self.shape = x, x.dtype, list(x.shape)

    def index(self, i: Any) -> "Shared":
        return Shared(self.x[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.x.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.x.permute(*order))

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.x.view(*shape))

    def load(self, layout: Any) -> Tensor:
        return self.x.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype
        self.x.copy_(value)
        partition.is_fenced = False


class Partition(threading.local):
    """What a partition has begun: products and copies that it has not waited for, stores that it has not fenced."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.copies: list[Callable[[], None]] = []
        self.is_fenced = True

    def fence(self) -> None:
        self.is_fenced = True

    def check_fenced(self) -> None:
        """Before others, or products and copies, read what it has stored."""
        assert self.is_fenced, "stored, and no fence since"


partition = Partition()


class Barrier:
    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.phase = self.pending = self.count = self.bytes = 0

    def init(self, count: int) -> None:
        self.count = self.pending = int(count)

    def arrive(self) -> None:
        partition.check_fenced()
        self.change(arrivals=1)
        time.sleep(1e-3)  # whoever waited for this goes on first

    def change(self, arrivals: int = 0, num_bytes: int = 0) -> None:
        with self.condition:
            self.pending -= arrivals
            self.bytes += num_bytes
            assert self.pending >= 0, "more arrivals than the barrier was made for"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.condition.notify_all()

    def wait(self, parity: Any) -> None:
        """Until the phase of this parity is over: the current one has the other parity."""
        with self.condition:
            over = self.condition.wait_for(lambda: self.phase % 2 != int(parity) % 2, TIMEOUT_SECONDS)
        assert over, "a partition waits forever"


class Barriers:
    def __init__(self, count: int):
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


class Descriptor:
    """Boxes of a tensor: what is outside it is read as zero, and not written."""

    def __init__(self, base: Pointer, shape: Sequence, strides: Sequence, block_shape: Sequence[int], layout: Any):
        self.shape, self.strides = [int(x) for x in shape], [int(x) for x in strides]
        assert all(stride * base.memory.element_size() % 16 == 0 for stride in self.strides[:-1]), self.strides
        self.base, self.dtype = base, base.dtype.element_ty
        self.block_shape = block_shape
        self.block_type = SimpleNamespace(nbytes=torch.Size(block_shape).numel() * base.memory.element_size())

    def __call__(self, at: Sequence) -> tuple[Pointer, Tensor]:
        offset, mask = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
        for dim, (start, block, size, stride) in enumerate(
            zip(at, self.block_shape, self.shape, self.strides, strict=True)
        ):
            i = (int(start) + torch.arange(block)).view([-1 if d == dim else 1 for d in range(len(at))])
            offset, mask = offset + i * stride, mask & (i >= 0) & (i < size)
        return self.base + offset, mask


def load_box(desc: Descriptor, at: Sequence, barrier: Barrier, result: Shared) -> None:
    pointer, mask = desc(at)
    result.x.copy_(load(pointer, mask))
    barrier.change(num_bytes=-desc.block_type.nbytes)


def store_box(desc: Descriptor, at: Sequence, source: Shared) -> None:
    assert all(int(start) >= 0 for start in at), "a GPU stores no box that begins outside of a tensor"
    pointer, mask = desc(at)
    partition.check_fenced()
    partition.copies.append(lambda: store(pointer, source.x, mask))


def wait_for_copies(pendings: int) -> None:
    while len(partition.copies) > pendings:
        partition.copies.pop(0)()


class Product:
    """Of tiles in shared memory, the first perhaps in registers, added to a tensor or another product."""

    def __init__(self, a: Any, b: Shared, accumulator: Any, use_acc: bool = True, is_async: bool = False):
        assert is_async
        self.a, self.b, self.accumulator, self.result = a, b, accumulator if use_acc else None, None
        partition.check_fenced()
        partition.products.append(self)

    def compute(self) -> None:
        a = self.a.x if isinstance(self.a, Shared) else self.a
        before = self.accumulator.result if isinstance(self.accumulator, Product) else self.accumulator
        self.result = a.float() @ self.b.x.float() + (0 if before is None else before)


def wait_for_products(num_outstanding: int = 0, deps: Sequence[Product] = ()) -> Any:
    while len(partition.products) > num_outstanding:
        partition.products.pop(0).compute()
    results = tuple(product.result for product in deps)
    assert all(result is not None for result in results), "used while it is being computed"
    return results[0] if len(results) == 1 else results


def counted(*bounds: Any) -> Iterator[Tensor]:
    """`range`, of tensors."""
    return map(torch.tensor, range(*map(int, bounds)))


def tensors(function: Callable) -> Callable:
    return lambda *xs: function(*(x if isinstance(x, Tensor) else torch.tensor(x) for x in xs))


def allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
    if dtype == torch.int64:
        return Barriers(shape[0])
    return Shared(torch.full(list(shape), float("nan"), dtype=dtype))


def warp_specialize(partitions: Sequence, num_warps: Sequence, num_registers: Sequence) -> None:
    errors = []

    def run(function: Callable, arguments: tuple) -> None:
        try:
            with torch.no_grad():
                function(*arguments)
            assert not [*partition.products, *partition.copies], "a partition ends, and something is under way"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Kernel:
    """`kernel[(programs,)](...)`, one program after the other."""

    def __init__(self, function: Callable, language: Any):
        self.function, self.language, self.__name__ = function, language, function.__name__
        self.arg_names = list(inspect.signature(function).parameters)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*arguments: Any, **options: Any) -> None:
            for i in range(grid[0]):
                self.language.program = i
                self.function(*(self.argument(x) for x in arguments))

        return launch

    def argument(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return Pointer(x)
        return x if x is None or isinstance(x, bool) else torch.tensor(x)


def _language() -> Any:
    language = SimpleNamespace(program=0)
    for name in ("float16", "float32", "bfloat16", "int32", "int64"):
        setattr(language, name, getattr(torch, name))
    for name in ("maximum", "minimum", "where", "floor", "exp2"):
        setattr(language, name, tensors(getattr(torch, name)))
    language.cdiv = lambda a, b: (a + b - 1) // b
    language.program_id = lambda axis: torch.tensor(language.program)
    language.constexpr = lambda x: x
    language.static_range = language.range = range
    language.arange = lambda start, end, layout=None: torch.arange(start, end)
    language.zeros = lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype)
    language.zeros_like = torch.zeros_like
    language.convert_layout = lambda x, layout: x
    language.load, language.store = load, store
    language.allocate_shared_memory, language.warp_specialize = allocate, warp_specialize
    for name in ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMASharedLayout"):
        setattr(language, name, lambda *arguments, **options: None)
    return language


class _Emulation:
    """Modules as the emulated language sees them: functions are copied, with other globals."""

    def __init__(self) -> None:
        self.language = _language()
        self.modules: dict[str, dict[str, Any]] = {}
        self.names = {
            "gl": self.language,
            "constexpr": self.language.constexpr,
            "tl": self.language,
            "load_box": load_box,
            "store_box": store_box,
            "warpgroup_mma": Product,
            "warpgroup_mma_wait": wait_for_products,
            "fence_async_shared": partition.fence,
            "let_next_begin": lambda: None,
            "wait_for_previous": lambda: None,
            "tma": SimpleNamespace(make_tensor_descriptor=Descriptor, store_wait=wait_for_copies),
            "mbarrier": SimpleNamespace(
                init=lambda barrier, count: barrier.init(count),
                wait=lambda barrier, phase: barrier.wait(phase),
                expect=lambda barrier, num_bytes: barrier.change(arrivals=1, num_bytes=num_bytes),
                arrive=lambda barrier: barrier.arrive(),
            ),
        }

    def copy(self, function: Any) -> Callable:
        return FunctionType(function.__code__, self.globals(function.__module__), function.__name__)

    def globals(self, module: str) -> dict[str, Any]:
        if module not in self.modules:
            found = self.modules[module] = dict(vars(sys.modules[module])) | {"range": counted}
            for name, value in found.items():
                if name in self.names:
                    found[name] = self.names[name]
                elif hasattr(value, "fn"):
                    found[name] = self.copy(value.fn)
                elif type(value).__name__ == "constexpr":
                    found[name] = value.value
        return self.modules[module]


def emulated(kernels: ModuleType) -> SimpleNamespace:
    """The kernels of a module, on the CPU."""
    emulation = _Emulation()
    found = {name: value for name, value in vars(kernels).items() if name.endswith("_kernel")}
    return SimpleNamespace(
        **{name: Kernel(emulation.copy(kernel.fn), emulation.language) for name, kernel in found.items()}
    )
