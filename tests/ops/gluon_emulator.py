"""Emulator of Gluon on a CPU: what a kernel reads and writes, and how its partitions wait for each other.

Partitions are threads, tensors are PyTorch's. Work that a GPU may finish late is done as late as possible: products
and TMA stores when they are waited for. TMA loads are done at once. Layouts and registers are ignored.
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
    """Memory of a tensor, with an offset or a block of offsets."""

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
    offset, is_loaded = torch.broadcast_tensors(p.offset, mask)
    x = p.memory[checked(p, torch.where(is_loaded, offset, 0))] if is_loaded.any() else p.memory.new_zeros(())
    return torch.where(is_loaded, x, torch.tensor(other, dtype=p.memory.dtype))


def store(p: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    offset, value = torch.broadcast_tensors(p.offset, value)
    mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand(offset.shape)
    p.memory[checked(p, offset[mask])] = value[mask].to(p.memory.dtype)


def checked(p: Pointer, offset: Tensor) -> Tensor:
    assert ((offset >= 0) & (offset < len(p.memory))).all(), "an address outside a tensor"
    return offset


class Shared:
    """A block of shared memory, or a view of one. Fresh memory holds NaN."""

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
    """Pending work of a partition: products and copies not waited for, and stores to shared memory not fenced."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.copies: list[Callable[[], None]] = []
        self.is_fenced = True

    def fence(self) -> None:
        self.is_fenced = True

    def check_fenced(self) -> None:
        """Check that stores are fenced, before other partitions, products or copies read them."""
        assert self.is_fenced, "stores to shared memory are not fenced"


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
        time.sleep(1e-3)  # partitions that waited for this go on first

    def change(self, arrivals: int = 0, num_bytes: int = 0) -> None:
        with self.condition:
            self.pending -= arrivals
            self.bytes += num_bytes
            assert self.pending >= 0, "more arrivals than the barrier was initialized with"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.condition.notify_all()

    def wait(self, parity: Any) -> None:
        """Wait until the phase of this parity is over: the current phase has the other parity."""
        with self.condition:
            over = self.condition.wait_for(lambda: self.phase % 2 != int(parity) % 2, TIMEOUT_SECONDS)
        assert over, "a partition waits forever"


class Barriers:
    def __init__(self, count: int):
        self.barriers = [Barrier() for _ in range(count)]
        self.shape = [count, 1]

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


class Descriptor:
    """Blocks of a tensor: elements outside the tensor are read as zero, and not written."""

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


def tma_load(desc: Descriptor, at: Sequence, barrier: Barrier, result: Shared) -> None:
    pointer, mask = desc(at)
    result.x.copy_(load(pointer, mask))
    barrier.change(num_bytes=-desc.block_type.nbytes)


def tma_store(desc: Descriptor, at: Sequence, source: Shared) -> None:
    assert all(int(start) >= 0 for start in at), "TMA stores no block that begins before a tensor"
    pointer, mask = desc(at)
    partition.check_fenced()
    partition.copies.append(lambda: store(pointer, source.x, mask))


def wait_for_copies(pendings: int) -> None:
    while len(partition.copies) > pendings:
        partition.copies.pop(0)()


class Product:
    """A product of tiles in shared memory, the first perhaps in registers, added to a tensor or to another product."""

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
    assert all(result is not None for result in results), "a product is used while it is being computed"
    return results[0] if len(results) == 1 else results


def counted(*bounds: Any) -> Iterator[Tensor]:
    """`range` over tensors."""
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
            assert not [*partition.products, *partition.copies], "a partition ends with pending work"
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
    """A kernel for `kernel[(num_programs,)](...)`, whose programs run one after the other."""

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


class Struct:
    """Base of emulated aggregates: fields that are constants hold their values."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _value(value))


def _value(x: Any) -> Any:
    return x.value if type(x).__name__ == "constexpr" else x


class _Emulation:
    """Copies of modules, whose functions and aggregates use the emulated language."""

    def __init__(self) -> None:
        self.language = _language()
        self.modules: dict[str, dict[str, Any]] = {}
        self.names = {
            "gl": self.language,
            "constexpr": self.language.constexpr,
            "tl": self.language,
            "tma_load": tma_load,
            "tma_store": tma_store,
            "warpgroup_mma": Product,
            "warpgroup_mma_wait": wait_for_products,
            "fence_async_shared": partition.fence,
            "trigger_dependents": lambda: None,
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

    def struct(self, aggregate: Any) -> type:
        init, *methods = aggregate.hash_attrs
        copies = {method.fn.__name__: self.copy(method.fn) for method in methods}
        return type(aggregate.__name__, (Struct,), {"__init__": init} | copies)

    def globals(self, module: str) -> dict[str, Any]:
        if module not in self.modules:
            found = self.modules[module] = dict(vars(sys.modules[module])) | {"range": counted}
            for name, value in found.items():
                if name in self.names:
                    found[name] = self.names[name]
                elif hasattr(value, "__triton_aggregate__"):
                    found[name] = self.struct(value)
                elif hasattr(value, "fn"):
                    found[name] = self.copy(value.fn)
                else:
                    found[name] = _value(value)
        return self.modules[module]


def emulated(kernels: ModuleType) -> SimpleNamespace:
    """Kernels of a module that run on the CPU."""
    emulation = _Emulation()
    found = {name: value for name, value in vars(kernels).items() if name.endswith("_kernel")}
    return SimpleNamespace(
        **{name: Kernel(emulation.copy(kernel.fn), emulation.language) for name, kernel in found.items()}
    )
