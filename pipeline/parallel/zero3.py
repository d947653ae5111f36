"""One stock DeepSpeed ZeRO-3 engine as a pipeline stage. Only this file uses DeepSpeed's internals.

DeepSpeed refuses ZeRO-2/3 inside its own pipeline engine. One engine per stage, over the stage's data-parallel group,
works with any external schedule, given these corrections:

1. *Group-local order check*: DeepSpeed compares parameter orders over the world, but stages differ, so training would
   fail or hang. Here the order is compared over the stage's data-parallel group.
2. *Consecutive backwards*: each backward starts with `clear_backward_seen_flag`; otherwise it overwrites the gradient
   shard that the previous one accumulated.
3. *One gradient norm*: every rank of the grid holds a different shard, so the clip norm and the decision to skip a
   non-finite step are taken over all ranks.
4. *One accumulation step*: the schedule runs the micro-batches and the caller scales its loss (see `ds_config`).
5. *Release after each backward*: DeepSpeed counts a module's open backwards in one counter that every forward resets;
   with several micro-batches in flight, weights would stay gathered after the first. Each call gets its own counter.
6. *Module stack*: recomputation ends a module's forward early, so DeepSpeed's stack of running modules grows with every
   recomputed layer; it is truncated after each step.
7. *Sums in fp32*: gradients reduced once a step stay on the parameters until then, where autograd would accumulate them
   in bf16. (Gradients reduced each micro-batch are added to a shard of ``grad_accum_dtype``.)
8. *Stages that train nothing*: DeepSpeed's engine can only run a backward with an optimizer. A stage whose parameters
   are all frozen has none: its module, with the hooks that gather and release weights, is called directly. Building an
   optimizer waits for all ranks of the world; here for those of the stage.
9. *No hooks once everything is gathered*: where a stage keeps all its weights for the step, the hooks that every module
   runs before and after its forward and backward have nothing left to do, and are off until the step ends. On a GPU
   they gather during the first forwards, beside the computation; on a CPU, where nothing overlaps, everything is
   gathered first. In a small model the hooks cost up to a fifth of a step.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator, stage3
from deepspeed.runtime.zero.utils import apply_to_tensors_only
from deepspeed.utils import numa, set_z3_leaf_module
from torch import nn

from pipeline.parallel.groups import Groups
from pipeline.parallel.launch import share_of_cores
from pipeline.parallel.topology import Topology
from pipeline.parallel.traffic import Traffic

TESTED_VERSIONS = ("0.19.8",)
STATES = ("exp_avg", "exp_avg_sq")
_GATHER, _REDUCE = partition_parameters._dist_allgather_fn, stage3.reduce_scatter_coalesced
_GATHER_PERSISTENT = partition_parameters.Init._allgather_params_coalesced
_GATHER_ONE = partition_parameters.Init._allgather_params_sequential
_PREFETCHED = 0.05  # share of a stage that may be prefetched where weights are released after each use
_DEFAULTS = {"stage3_prefetch_bucket_size": 5e7, "stage3_max_live_parameters": 1e9}
_TRACE_MODE = "_PartitionedParameterCoordinator__trace_mode"
_HOLD = -1  # not the id of any module: a parameter held under it stays gathered until the optimizer step
_GATHERED = partition_parameters.ZeroParamStatus.AVAILABLE
_BUCKET = 50_000_000  # elements gathered by one collective where a whole stage is gathered before its first forward
# DeepSpeed counts the CPUs' NUMA nodes with a process of its own, at every reduction.
numa.get_numa_cores = functools.cache(numa.get_numa_cores)


class _Mpu:
    """DeepSpeed's view of the grid: data parallelism within the stage, no model parallelism."""

    def __init__(self, topology: Topology, groups: Groups) -> None:
        self._topology, self._groups = topology, groups

    def get_data_parallel_group(self) -> Any:
        return self._groups.data

    def get_data_parallel_world_size(self) -> int:
        return self._topology.dp

    def get_data_parallel_rank(self) -> int:
        return self._topology.dp_rank

    def get_model_parallel_group(self) -> Any:
        return self._groups.self_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


@dataclass(frozen=True)
class StepResult:
    """Result of an optimizer step; the same on every rank."""

    grad_norm: float
    """Global gradient norm before clipping; not finite when the step was skipped."""
    applied: bool


def check_version() -> str | None:
    """Return a warning when the corrections were not tested with this version of DeepSpeed, else None."""
    if deepspeed.__version__ in TESTED_VERSIONS:
        return None
    return f"DeepSpeed {deepspeed.__version__} was not tested here (tested: {', '.join(TESTED_VERSIONS)})"


def sharder(topology: Topology, groups: Groups, ds_config: dict[str, Any]) -> Callable[[nn.Module], None]:
    """Return a function that broadcasts a module's weights from dp rank 0 of the stage and keeps this rank's shards."""
    _compare_orders_within(groups.data)
    mpu = _Mpu(topology, groups)
    dtype = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32

    def shard(module: nn.Module) -> None:
        deepspeed.zero.Init(
            module=module, data_parallel_group=groups.data, config_dict_or_path=ds_config, mpu=mpu, dtype=dtype
        )

    return shard


def _compare_orders_within(group: Any) -> None:
    """Correction 1: compare over the stage's data-parallel group instead of the world."""

    def same(ints: list[int]) -> None:
        """Raise RuntimeError unless every rank of the group has these numbers, compared by length and hash."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        mine = torch.tensor([len(ints), hash(tuple(ints)) % (1 << 62)], dtype=torch.long, device=device)
        low, high = mine.clone(), mine.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
        if not torch.equal(low, high):
            raise RuntimeError("the data-parallel ranks of a stage touched different parameters or in another order")

    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        assert hasattr(module, "assert_ints_same_as_other_ranks"), f"{module.__name__} changed: see zero3.py"
        module.assert_ints_same_as_other_ranks = same


def _count_collectives(traffic: Traffic) -> None:
    """Count DeepSpeed's gathers and reductions from now on, replacing any earlier counter."""

    def gather(shard: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        """Gather every rank's flat ``shard`` into ``whole``, and count its bytes."""
        traffic.gathered += whole.nbytes
        traffic.gathers += 1
        return _GATHER(shard, whole, group)

    def reduce(tensors: list[torch.Tensor], group: Any = None) -> Any:
        """Reduce-scatter whole gradients to shards, and count their bytes."""
        traffic.reduced += sum(tensor.nbytes for tensor in tensors)
        traffic.reductions += 1
        return _REDUCE(tensors, group)

    def counted(gather_params: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap DeepSpeed's method ``(init, params, ...)`` to count the sharded parameters it gathers."""

        def gather_each(init: Any, params: list[Any], *args: Any, **options: Any) -> Any:
            sharded = [param for param in params if param.ds_zero_partition_world_size > 1]
            traffic.gathered += sum(param.ds_numel_aligned * param.ds_tensor.element_size() for param in sharded)
            traffic.gathers += len(sharded)
            return gather_params(init, params, *args, **options)

        return gather_each

    partition_parameters._dist_allgather_fn = gather
    stage3.reduce_scatter_coalesced = reduce
    partition_parameters.Init._allgather_params_coalesced = counted(_GATHER_PERSISTENT)
    partition_parameters.Init._allgather_params_sequential = counted(_GATHER_ONE)


def _params(module: nn.Module) -> list[Any]:
    """Return a module's parameters; mypy knows nothing of what DeepSpeed puts on them."""
    return list(module.parameters())


def _limit_prefetch(ds_config: dict[str, Any], numel: int, gathered_fraction: float) -> dict[str, Any]:
    """Limit how much of a stage of ``numel`` elements is prefetched.

    DeepSpeed's prefetch does not release a parameter that was already gathered when its turn came. Over several
    micro-batches everything would stay gathered, unless `stage3_max_live_parameters` limits the prefetch.
    """
    zero = ds_config["zero_optimization"]
    bounds = {
        "stage3_prefetch_bucket_size": _PREFETCHED * numel,
        "stage3_max_live_parameters": (gathered_fraction + _PREFETCHED) * numel,
    }
    bounded = {key: min(int(zero.get(key, _DEFAULTS[key])), int(bound)) for key, bound in bounds.items()}
    return {**ds_config, "zero_optimization": {**zero, **bounded}}


def _disable_reuse_search(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Disable DeepSpeed's reuse search; `gathered_fraction` decides what stays gathered.

    The search scans the trace at the end of every module, and a trace here covers a whole step: quadratic time.
    """
    return {**ds_config, "zero_optimization": {**ds_config["zero_optimization"], "stage3_max_reuse_distance": 0}}


def _leave_muon_uncompiled() -> None:
    """Import Muon without torch.compile: DeepSpeed imports it for a type check, and compiling takes two seconds."""
    compile_, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_


@contextlib.contextmanager
def _barriers_within(group: Any) -> Iterator[None]:
    """Correction 8: let DeepSpeed's ZeRO-3 optimizer wait for the ranks of a group instead of the world."""
    world = stage3.dist.barrier
    stage3.dist.barrier = functools.partial(world, group=group)
    try:
        yield
    finally:
        stage3.dist.barrier = world


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads on the host."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _CallEnd(torch.autograd.Function):
    """Passes the inputs of one call through, and calls back once all their gradients are computed."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, open_inputs: list[int], release: Callable[[], None]) -> torch.Tensor:  # type: ignore[override]
        """Return the input unchanged; count it in the call's ``open_inputs`` if it requires a gradient."""
        ctx.open_inputs, ctx.release = open_inputs, release
        open_inputs[0] += tensor.requires_grad
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient unchanged; release after the call's last input."""
        ctx.open_inputs[0] -= 1
        if ctx.open_inputs[0] == 0:
            ctx.release()
        return grads[0], None, None


def _release_each_call(offload: Any, root: nn.Module) -> None:
    """Correction 5: count open inputs per call of a module instead of per module."""

    def before_forward(module: nn.Module, inputs: Any) -> Any:
        open_inputs, release = [0], functools.partial(offload.post_sub_module_backward_function, module)
        return apply_to_tensors_only(lambda tensor: _CallEnd.apply(tensor, open_inputs, release), inputs)  # type: ignore[no-untyped-call]

    replaced = 0
    for module in root.modules():
        for key, hook in module._forward_pre_hooks.items():
            if "_post_backward_module_hook" in getattr(hook, "__qualname__", ""):
                module._forward_pre_hooks[key] = before_forward
                replaced += 1
    if not replaced:
        raise RuntimeError(f"DeepSpeed {deepspeed.__version__} lacks _post_backward_module_hook: see zero3.py")


class _ModuleHooks:
    """The hooks that DeepSpeed has put on every module of a stage, to take off and put back (correction 9)."""

    def __init__(self, offload: Any) -> None:
        handles = [*offload.forward_hooks, *offload.backward_hooks]  # in the order in which they must run
        self._hooks = [(own, handle.id, own[handle.id]) for handle in handles if (own := handle.hooks_dict_ref())]
        self.active = True

    def switch(self, on: bool) -> None:
        """Put the hooks on the modules, or take them off."""
        if on == self.active:
            return
        for own, key, hook in self._hooks:
            if on:
                own[key] = hook
            else:
                del own[key]
        self.active = on


def _buckets(params: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield parameters in groups of at most ``_BUCKET`` elements, or of one larger parameter."""
    group: list[Any] = []
    for param in params:
        if group and sum(each.ds_numel for each in group) + param.ds_numel > _BUCKET:
            yield group
            group = []
        group.append(param)
    if group:
        yield group


def _add_up_in_fp32(params: Iterable[nn.Parameter]) -> None:
    """Correction 7: cast the first gradient to fp32; autograd adds the others to it in place."""

    def widen(param: nn.Parameter) -> None:
        if param.grad is not None and param.grad.dtype in (torch.bfloat16, torch.float16):
            param.grad = param.grad.float()

    for param in params:
        param.grad_dtype = (
            None  # any dtype; fp32 would refuse the zeros that DeepSpeed sets for unused parameters of a leaf
        )
        param.register_post_accumulate_grad_hook(widen)  # type: ignore[no-untyped-call]


class Zero3Stage:
    """A stage's module under ZeRO-3, driven by an external schedule."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        topology: Topology,
        groups: Groups,
        ds_config: dict[str, Any],
        gathered_fraction: float,
        reduce_once: bool,
        tied: nn.Parameter | None = None,
        leaves: Iterable[nn.Module] = (),
        gather_first: bool | None = None,
        progress_callback: Callable[[str], None] = lambda activity: None,
    ) -> None:
        """Wrap a module whose parameters `sharder` has sharded.

        Args:
            module: The stage; forward takes (hidden | None, StageInputs).
            optimizer: A torch optimizer over the module's trainable parameters; None if there are none. A group's
                ``lr_scale`` multiplies the learning rate of each step.
            topology: Place of this rank.
            groups: Its process groups.
            ds_config: Completed DeepSpeed configuration.
            gathered_fraction: Share of the stage's parameters kept gathered within a step.
            reduce_once: Reduce-scatter gradients once a step instead of once a micro-batch.
            tied: This stage's copy of a trained weight that the first and the last stage share across ranks.
            leaves: Modules whose parameters are gathered together, not one sub-module at a time.
            gather_first: Where everything is kept gathered, gather it before the first forward instead of during it.
                None = on CPUs, where gathering cannot overlap with computation.
            progress_callback: Called with each activity as it begins, for the report on a rank that hangs.
        """
        self.topology, self._groups, self._tied, self._progress_callback = topology, groups, tied, progress_callback
        self._gathered_fraction, self._reduce_once = gathered_fraction, reduce_once
        for leaf in leaves:
            set_z3_leaf_module(leaf, True)
        if gathered_fraction < 1:
            numel = sum(param.ds_numel for param in _params(module))
            ds_config = _limit_prefetch(ds_config, numel, gathered_fraction)
        _leave_muon_uncompiled()
        with _barriers_within(groups.data):
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=_disable_reuse_search(ds_config), mpu=_Mpu(topology, groups)
            )
        # Without an optimizer, DeepSpeed has only the part that gathers and releases weights (correction 8).
        self._trains = optimizer is not None
        self._zero = self.engine.optimizer
        self._offload = self._zero.parameter_offload if self._trains else self._zero
        self._check_internals()
        self._offload.fwd_pre_hook.remove()  # one parameter trace per optimizer step, not per forward
        _release_each_call(self._offload, self.module)
        self._hooks = _ModuleHooks(self._offload)
        self._params = _params(self.module)
        self._gather_first = self.engine.device.type == "cpu" if gather_first is None else gather_first
        self._accumulates = False
        if self._trains:
            self._zero._get_norm_groups = self._global_norm  # correction 3
        if reduce_once:
            _add_up_in_fp32(param for _, param in self.trainable())
        # A rank runs one thread, which is enough to feed a GPU; an update on the host uses all of its cores.
        on_host = self._trains and self._zero.offload_optimizer and self.engine.device.type == "cuda"
        self._threads = share_of_cores() if on_host else torch.get_num_threads()
        self._norm, self._frozen_steps = 0.0, 0
        self._running = len(parameter_offload.FWD_MODULE_STACK)
        self.traffic = Traffic()
        _count_collectives(self.traffic)

    def _check_internals(self) -> None:
        """Fail at start-up, not in mid-run, if DeepSpeed's internals have changed."""
        needed = ("parameter_offload", "fp16_groups", "averaged_gradients", "fp32_partitioned_groups_flat",
                  "grad_position", "grad_partitions_flat_buffer", "clear_backward_seen_flag", "_get_norm_groups",
                  "_reassign_or_swap_out_partitioned_parameters")  # fmt: skip
        missing = [name for name in needed if self._trains and not hasattr(self._zero, name)]
        hooks = ("fwd_pre_hook", "forward_hooks", "backward_hooks")
        missing += [name for name in hooks if not hasattr(self._offload, name)]
        if missing:
            raise RuntimeError(f"DeepSpeed {deepspeed.__version__} lacks {', '.join(missing)}: see zero3.py")
        if not hasattr(self._offload.get_param_coordinator(), _TRACE_MODE):
            raise RuntimeError(f"DeepSpeed {deepspeed.__version__} lacks {_TRACE_MODE}: see zero3.py")

    @property
    def module(self) -> nn.Module:
        """The wrapped stage."""
        return self.engine.module  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Surround all forwards and backwards of one optimizer step."""
        self._hold()
        self._offload.get_param_coordinator().reset_step()
        self._accumulates = True
        if self._gathered_fraction == 1 and self._gather_first:
            for group in _buckets(param for param in self._params if param.ds_status != _GATHERED):
                group[0].all_gather_coalesced(group).wait()
        self._drop_hooks()
        # A step's first backward overwrites the last step's gradients, but only of its own virtual stage: clear all.
        if self._trains:
            with _threads(self._threads):
                self._zero.grad_partitions_flat_buffer.zero_()
        once = self._trains and self._reduce_once
        with self.engine.coalesce_grad_reduction() if once else contextlib.nullcontext():
            yield
        self._accumulates = False
        self._hooks.switch(on=True)
        del parameter_offload.FWD_MODULE_STACK[self._running :]  # correction 6
        if self._tied is not None:
            self._sum_tied(self.gradient_shard(self._tied))

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Surround forwards between two optimizer steps that must leave no trace in training.

        DeepSpeed neither records them nor takes them for the beginning of a step: its record of the order of modules,
        by which it prefetches, stays as it is. Weights are held as in a step and released at the end.
        """
        coordinator = self._offload.get_param_coordinator()
        mode, was_training = getattr(coordinator, _TRACE_MODE), self.module.training
        setattr(coordinator, _TRACE_MODE, partitioned_param_coordinator.ZeRoTraceMode.INVALID)
        self.module.eval()
        self._hold()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(was_training)
            del parameter_offload.FWD_MODULE_STACK[self._running :]  # correction 6
            setattr(coordinator, _TRACE_MODE, mode)
        self._offload.partition_all_parameters()
        self.refresh_persistent()
        self.traffic.take()  # not that of a step

    def _sum_tied(self, shard: torch.Tensor) -> None:
        """Add the gradient of the other copy: shape and dp are equal, so the shards match and are summed pairwise."""
        on_device = shard.to(self.engine.device)  # NCCL cannot send host memory
        dist.all_reduce(on_device, group=self._groups.embedding_group)
        shard.copy_(on_device)

    def _hold(self) -> None:
        """Keep parameters gathered, up to ``gathered_fraction``, until the optimizer step releases them."""
        left = self._gathered_fraction * sum(param.ds_numel for param in self._params)
        for param in self._params:
            if param.ds_numel <= left:
                left -= param.ds_numel
                param.ds_active_sub_modules.add(_HOLD)

    def forward(self, hidden: torch.Tensor | None, inputs: Any, layers: range | None = None) -> torch.Tensor:
        """Run one micro-batch forward, through one virtual stage or all layers of the stage."""
        as_module = not (self._trains and torch.is_grad_enabled())
        run = self.module if as_module else self.engine  # correction 8
        output: torch.Tensor = run(hidden, inputs, layers)
        self._drop_hooks()
        return output

    def _drop_hooks(self) -> None:
        """Correction 9: take the hooks off within a step, once all weights are gathered for the rest of it."""
        if self._accumulates and self._gathered_fraction == 1 and self._hooks.active:
            self._hooks.switch(on=any(param.ds_status != _GATHERED for param in self._params))

    def backward(self, output: torch.Tensor, grad: torch.Tensor | None = None) -> None:
        """Run one micro-batch backward, from a loss or from the next stage's gradient of the hidden states."""
        if self._trains:
            self._zero.clear_backward_seen_flag()  # correction 2
        if output.requires_grad:  # not that of a first stage that trains nothing
            torch.autograd.backward(output, grad)

    def step(self, lr: float) -> StepResult:
        """Clip, update and re-shard; skipped on all ranks alike when the gradient norm is not finite."""
        if not self._trains:
            return self._frozen_step()
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._progress_callback("adding up the gradient norm")
        with _threads(self._threads):
            self.engine.step()
        return StepResult(self._norm, bool(self.engine.was_step_applied()))

    def _frozen_step(self) -> StepResult:
        """Take part in the other stages' step, and release what was held."""
        self._global_norm()
        self._offload.partition_all_parameters()
        self.refresh_persistent()
        applied = math.isfinite(self._norm)
        self._frozen_steps += applied
        return StepResult(self._norm, applied)

    def gradient_shard(self, param: nn.Parameter) -> torch.Tensor:
        """Return this rank's flat shard of a gradient accumulated in this step, before clipping; writing is allowed."""
        group, offset, count = self._zero.grad_position[self._zero.get_param_id(param)]
        if self._zero.offload_optimizer:
            return self._zero.fp32_partitioned_groups_flat[group].grad.narrow(0, offset, count)  # type: ignore[no-any-return]
        place = next(i for i, own in enumerate(self._zero.fp16_groups[group]) if own is param)
        return self._zero.averaged_gradients[group][place]  # type: ignore[no-any-return]

    def _grad_shards(self) -> Iterator[torch.Tensor]:
        """Yield this rank's shards of all gradients; none on a stage that trains nothing."""
        for group, params in enumerate(self._zero.fp16_groups if self._trains else ()):
            if self._zero.offload_optimizer:
                yield from (self.gradient_shard(param) for param in params if not self._second_copy(param))
            else:
                pairs = zip(params, self._zero.averaged_gradients[group], strict=True)
                yield from (grad for param, grad in pairs if not self._second_copy(param))

    def _second_copy(self, param: nn.Parameter) -> bool:
        """Whether the first stage already counts this tied weight."""
        return param is self._tied and not self.topology.first

    def _global_norm(self) -> list[torch.Tensor]:
        """Correction 3: the norm over all shards of all stages; -1 makes DeepSpeed skip the step."""
        shards = list(self._grad_shards()) or [torch.zeros(1, device=self.engine.device)]
        norms = torch._foreach_norm(shards, 2, torch.float32)  # half-precision shards: no copies
        total = torch.stack(norms).double().square().sum(0, keepdim=True).to(self.engine.device)
        self._progress_callback(
            "waiting for all ranks: the gradient norm"
        )  # on GPUs, the host runs ahead of the device up to here
        dist.all_reduce(total)
        norm = total.sqrt()[0]
        if self._trains and self._zero.offload_optimizer:
            norm = norm.cpu()  # the gradients it clips are on the host
        self._norm = float(norm)
        self._progress_callback("optimizer step")
        return [torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))]

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (global name, parameter) of every parameter that trains."""
        return ((name, param) for name, param in self.module.named_parameters() if param.requires_grad)

    def frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (global name, parameter) of every frozen parameter."""
        return ((name, param) for name, param in self.module.named_parameters() if not param.requires_grad)

    def master_shard(self, param: nn.Parameter, state: str | None = None) -> torch.Tensor:
        """Return this rank's flat fp32 shard of a trainable parameter or of its optimizer state; writing is allowed."""
        group, offset, count = self._zero.grad_position[self._zero.get_param_id(param)]
        flat = self._zero.fp32_partitioned_groups_flat[group]
        source = flat if state is None else self._optimizer_state(flat)[state]
        return source.detach().narrow(0, offset, count)  # type: ignore[no-any-return]

    def _optimizer_state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return AdamW's state of one flat group, created as AdamW would create it at its first step."""
        state = self._zero.optimizer.state[flat]
        if not state:
            device = flat.device if self._zero.optimizer.defaults.get("fused") else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in STATES:
                state[name] = torch.zeros_like(flat)
        return state  # type: ignore[no-any-return]

    @property
    def optimizer_steps(self) -> int:
        """Updates AdamW has counted (skipped steps are not)."""
        if not self._trains:
            return self._frozen_steps
        return int(self._optimizer_state(self._zero.fp32_partitioned_groups_flat[0])["step"])

    def finish_load(self, optimizer_steps: int) -> None:
        """Copy fp32 shards that were written through `master_shard` to the compute-type shards."""
        self._frozen_steps = optimizer_steps
        for group, flat in enumerate(self._zero.fp32_partitioned_groups_flat if self._trains else ()):
            self._optimizer_state(flat)["step"].fill_(optimizer_steps)
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self.refresh_persistent()

    def refresh_persistent(self) -> None:
        """Gather the parameters that DeepSpeed keeps whole again, after their shards were written."""
        persistent: Sequence[Any] = self._offload.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    @staticmethod
    def compute_shard(param: Any) -> torch.Tensor:
        """Return this rank's flat shard of a parameter in the compute type (a frozen one has no other)."""
        return param.ds_tensor.data.view(-1)  # type: ignore[no-any-return]

    @staticmethod
    def full_shape(param: Any) -> torch.Size:
        """Return the shape of the whole parameter."""
        return param.ds_shape  # type: ignore[no-any-return]
