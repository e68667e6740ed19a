"""DeepSpeed from a recipe: sharding, precision, offload, clipping and accumulation around a task."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossgate import environment
from crossgate.config import EngineConfig, OptimConfig, Recipe
from crossgate.errors import UserError
from crossgate.recipe import micro_batch
from crossgate.training.world import World

# Settings that the recipe owns: two places for one number would contradict each other.
_OWNED = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.global_batch and engine.accumulation",
    "gradient_accumulation_steps": "engine.accumulation",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.warmup and optim.final_lr",
}


BUCKET = 5_000_000
"""Elements of gradients that ranks sum at once: about as many bytes as DDP takes, few enough to stay in caches."""
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step(nn.Module):
    """What the engine wraps: the task, under autocast when its weights have 16 bits.

    Clips arrive as bytes and fp32; autocast meets 16-bit weights half-way and keeps losses and norms in fp32.
    """

    task: Any

    def __init__(self, task: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.task = task
        self._device, self._precision = device, precision
        self.scalars: set[int] = set()
        """Parameters that have no dimension in the caller's task, by `id`."""
        self.constant: dict[str, Tensor] = {}
        """What does not train, by name, as it was before DeepSpeed rounded it to 16 bits (rank 0 alone keeps it)."""

    def forward(self, batch: Any, *, encode: bool = False) -> Any:
        """Returns ``(loss, report)`` of the batch, or what the task makes of it before its objective."""
        with self.autocast():
            if encode:
                return self.task.encode(batch)
            loss, report = self.task(batch)
        return loss.reshape(()), report

    def autocast(self) -> AbstractContextManager[None]:
        """Returns the context in which the task computes; a fresh one each time."""
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, _HALVES[self._precision])


def build_engine(task: nn.Module, recipe: Recipe, world: World) -> Any:
    """Returns a DeepSpeed engine over a copy of the task.

    The copy is sharded, cast and moved; the caller's task stays a plain module on its device. `engine(batch)` gives
    ``(loss, report)``; `engine.backward(loss)` and `engine.step()` follow after each micro-batch.

    Args:
        task: a module with ``forward(batch)`` and ``parameter_groups(OptimConfig)``.

    Raises:
        UserError: for a DeepSpeed JSON that cannot be used, a batch that the ranks cannot share evenly, or a device
            without fp16.
    """
    deepspeed = _import_deepspeed(world)
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    settings = deepspeed_settings(recipe, world, trained)
    if recipe.engine.precision == "fp16":
        _check_fp16(world)
    module = Step(copy.deepcopy(task), world.device, recipe.engine.precision)
    if recipe.engine.activation_checkpointing:
        module.task.checkpoint_activations()
    if recipe.engine.compile:
        module.task.compile_encoders()
    for parameter in module.task.parameters():
        if parameter.ndim == 0:  # DeepSpeed cannot broadcast it; `full_weights` gives the shape back
            parameter.data = parameter.data.reshape(1)
            module.scalars.add(id(parameter))
    if world.leads and recipe.engine.precision != "fp32":
        module.constant = _constant(module.task)
    with _quiet():
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=_adamw(module.task, recipe.optim),
            config=settings,
            dist_init_required=False,
        )
    if world.ranks == 1 and engine.zero_optimization_stage() == 0:
        engine.enable_backward_allreduce = False  # it would copy every gradient into a bucket and back, for nobody
    return engine


def deepspeed_settings(recipe: Recipe, world: World, trained: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration: what the recipe says, with the user's own JSON merged over it.

    Args:
        recipe: of the run.
        world: the ranks.
        trained: parameters that train.

    Raises:
        UserError: as `build_engine`.
    """
    config = recipe.engine
    ours = clips_by_itself(config)
    stage = config.stage(world.ranks)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage in (1, 2):
        # A sum sent to its owner alone is half the traffic of one for all; not so where a bucket has many owners.
        zero["use_multi_rank_bucket_allreduce"] = trained < world.ranks * BUCKET
        zero["compute_grad_norm"] = not ours
        # Each gradient would be copied into a bucket first, a tenth of a step's time on a CPU.
        zero["contiguous_gradients"] = config.offload != "none"
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch(recipe, world.ranks),
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": 0.0 if ours else recipe.optim.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": not ours},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a micro-batch
    }
    return _merged(settings, user_settings(config.deepspeed)) if config.deepspeed else settings


def full_weights(engine: Any, world: World) -> dict[str, Tensor]:
    """Returns the whole task's state as fp32 on the host of rank 0, and nothing elsewhere. Every rank must call it.

    Weights come from the optimiser's fp32 masters where there are any, gathered from all ranks where sharded; what does
    not train is as it was at the start.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, Tensor] = {}
    for name, value in engine.module.task.state_dict(keep_vars=True).items():
        whole = safe_get_full_fp32_param(value) if value.requires_grad else None
        if whole is None:
            whole = _gathered(value)
        if world.leads:
            whole = engine.module.constant.get(name, whole)
            whole = whole.detach().reshape(() if id(value) in engine.module.scalars else whole.shape)
            state[name] = (whole.float() if whole.is_floating_point() else whole).cpu().clone().contiguous()
    return state


def loss_scale(engine: Any) -> dict[str, float]:
    """Returns where the search for fp16's scale of losses stands; empty under another precision."""
    if not engine.fp16_enabled():
        return {}
    scaler = engine.optimizer.loss_scaler
    return {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}


def set_loss_scale(engine: Any, state: Mapping[str, float]) -> None:
    """Goes on with the search from where `loss_scale` found it; nothing, from another precision, starts it anew."""
    if engine.fp16_enabled():
        for name, value in state.items():
            setattr(engine.optimizer.loss_scaler, name, value)


def _constant(task: nn.Module) -> dict[str, Tensor]:
    """Returns the floating-point values that no step changes, frozen weights and buffers, on the host."""
    return {
        name: value.detach().cpu().clone()
        for name, value in task.state_dict(keep_vars=True).items()
        if value.is_floating_point() and not value.requires_grad
    }


def _gathered(value: Any) -> Tensor:
    """Returns a buffer or frozen weight whole; ZeRO-3 shards even what does not train."""
    if not hasattr(value, "ds_id"):
        return value
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([value]):
        whole: Tensor = value.detach().clone()
    return whole


def clips_by_itself(config: EngineConfig) -> bool:
    """Whether `Driver` clips and checks the gradient, rather than DeepSpeed, which does so by a look from the host.

    Not where weights are in parts or on the host, and not under fp16, whose scale of losses DeepSpeed seeks by it.
    """
    return config.zero_stage != 3 and config.offload == "none" and config.precision != "fp16"


def _adamw(task: Any, optim: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        task.parameter_groups(optim), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )


def _check_fp16(world: World) -> None:
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise UserError(
            f"this {'GPU' if world.device.type == 'cuda' else 'CPU'} cannot train in fp16",
            where="engine.precision",
            cure="set it to bf16 or fp32",
        )


def _import_deepspeed(world: World) -> Any:
    environment.prepare_deepspeed(world.local_rank, cpu=world.device.type == "cpu")
    # DeepSpeed calls collectives that torch has renamed; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with _quiet(), _without_stderr(), _lean():
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops

        with suppress(ImportError):  # other versions may have none
            import deepspeed.runtime.zero.muon.muon_optimizer

        if world.device.type == "cpu":
            # Shared-memory collectives would be compiled for one to two minutes at the first start; gloo does as well.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(
                "nccl" if world.device.type == "cuda" else "gloo", verbose=False, auto_mpi_discovery=False
            )
    return deepspeed


def user_settings(path: str) -> dict[str, Any]:
    """Returns the user's DeepSpeed JSON.

    Raises:
        UserError: when it cannot be read, or sets what belongs to the recipe.
    """
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=path, cure="check engine.deepspeed in the recipe"
        ) from None
    except ValueError as error:
        raise UserError(f"not JSON ({error})", where=path, cure="check engine.deepspeed in the recipe") from None
    if not isinstance(settings, dict):
        raise UserError("not a DeepSpeed configuration", where=path, expected="a JSON object")
    for key in settings.keys() & _OWNED.keys():
        raise UserError(f"'{key}' belongs to the recipe", where=path, cure=f"set {_OWNED[key]} instead")
    return settings


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Swallows what child processes say: at its import DeepSpeed tries out which libraries a compiler can find."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _lean() -> Iterator[None]:
    """Keeps imports from loading what is not used here: six seconds of every start of a process.

    DeepSpeed's autotuner looks whether there is an MLflow, by loading it; its Muon would be compiled, for which all of
    PyTorch's compiler is loaded.
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    compiler = torch.compile
    torch.compile = lambda model=None, **options: model or (lambda function: function)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler
        if hidden:
            del sys.modules["mlflow"]


class _quiet(warnings.catch_warnings):
    """Hides the deprecation warnings that DeepSpeed's own use of torch raises."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
