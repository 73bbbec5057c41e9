"""Data parallelism by DeepSpeed: ZeRO stages 0 to 3 (Rajbhandari et al. 2020).

Stage 0 is plain data parallelism; stage 1 partitions the optimizer state across ranks, 2 also the gradients, 3 also
the weights.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import torch
from torch import nn

from distrain.config import Config
from distrain.execution.precision import Autocast, LossScale
from distrain.parallel import deepspeed_state
from distrain.parallel.environment import read_environment
from distrain.parallel.group import Group
from distrain.parallel.strategy import State, Update, model_state, optimizer_state
from distrain.recipe.optimizers import build_optimizer, init_state, set_lr, update_clipped

_UNUSED = {
    "deepspeed.autotuning.autotuner": "Autotuner",  # imports MLflow
    "deepspeed.runtime.zero.muon.muon_optimizer": "MuonWithAuxAdam",
    "deepspeed.runtime.zero.muon.original_muon": "muon_update",  # imports torch's compiler
}
"""Parts of DeepSpeed that it imports at every start, for seconds, though nothing here uses them; and what it looks for
in them."""


class Zero:
    """Strategy that runs micro-batches under DeepSpeed's engine; every rank has the same number of lanes."""

    def __init__(
        self, config: Config, network: Autocast, group: Group, micro_batches: int, saved: State | None
    ) -> None:
        self.network: nn.Module = network
        self._module = module = network.network
        self._group = group
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self._buffers = dict(module.named_buffers())
        self._micro_batches = micro_batches // group.world
        self._stage = int(config.parallel.strategy.removeprefix("zero"))
        self._config = config.optimizer
        # In host memory for stages 1 to 3: there DeepSpeed takes it as a number, and tells whether it took the step.
        self._scale = LossScale(config.train.precision, torch.device("cpu") if self._stage else group.device)
        # Before DeepSpeed partitions the weights: those set later through its API did not reach the next forward pass.
        if saved is not None:
            module.load_state_dict(model_state(saved))
            self._scale.load(saved)
        module.to(memory_format=torch.contiguous_format)  # DeepSpeed flattens weights as views
        self._engine = _open_engine(network, build_optimizer(module, config.optimizer), self._settings(config), group)
        if self._stage:
            self._zero = self._engine.optimizer
            deepspeed_state.init_partition_state(self._zero)
        else:
            self._optimizer = self._engine.optimizer
            init_state(self._optimizer)
        if saved is not None:
            self._load_optimizer(saved)

    def _settings(self, config: Config) -> dict[str, Any]:
        # The defaults are buffers for 5e8 gradients and 1e9 gathered weights, more than any of our networks has.
        bucket = int(config.parallel.bucket_mb * 2**20 / 4)
        zero: dict[str, Any] = {
            "stage": self._stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": 2 * bucket,
        }
        if self._group.device.type == "cuda":
            zero["overlap_comm"] = True  # its default, for the other stages, is to exchange gradients between kernels
        if config.parallel.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self._group.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": config.batch.per_lane,
            "gradient_accumulation_steps": self._micro_batches,
            "gradient_clipping": config.optimizer.clip_norm,  # DeepSpeed's default is 1.0
            "zero_allow_untested_optimizer": True,  # SGD is one
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "steps_per_print": 1 << 60,
        }

    @contextmanager
    def micro_batch(self, number: int) -> Iterator[None]:
        """Stages 0 and 1 reduce gradients in the last micro-batch of a step, 2 and 3 in each, to keep one partition."""
        self._engine.set_gradient_accumulation_boundary(number == self._micro_batches - 1)
        yield

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._engine(images)
        return logits

    def backward(self, loss: torch.Tensor) -> None:
        if self._stage:
            self._zero.override_loss_scale(float(self._scale.value))
        else:
            loss = loss * self._scale.value
        self._engine.backward(loss)

    def update(self, lr: float) -> Update:
        if self._stage:
            set_lr(self._zero, lr)
            self._engine.step()
            update = self._result()
            self._scale.update(torch.tensor(self._engine.was_step_applied()))
        else:
            update = Update(*update_clipped(self._optimizer, self._parameters, lr, self._scale.value, self._config))
            self._engine.zero_grad()
            self._scale.update(update.applied)
        return update

    def _result(self) -> Update:
        """What DeepSpeed says of the step, on the device. A number is filled in there rather than copied, which would
        wait."""
        norm, device = self._engine.get_global_grad_norm(), self._group.device
        if not isinstance(norm, torch.Tensor):
            norm = torch.full((), norm, device=device)
        applied = torch.full((), self._engine.was_step_applied(), dtype=torch.bool, device=device)
        return Update(norm.float(), applied)

    def weights(self) -> State:
        if self._stage < 3:
            return dict(self._module.state_dict())
        from deepspeed.utils import safe_get_full_fp32_param

        trained = {name: safe_get_full_fp32_param(parameter) for name, parameter in self._parameters.items()}
        return self._buffers | trained | deepspeed_state.gather(self._frozen)

    def state(self) -> State:
        tensors = {f"model/{name}": tensor for name, tensor in self.weights().items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer_state(parameter):
                tensors[f"optimizer/{name}/{key}"] = value
        return tensors | self._scale.state()

    def _optimizer_state(self, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
        if self._stage:
            return deepspeed_state.read_optimizer_state(self._zero, parameter)
        return iter(self._optimizer.state[parameter].items())

    def _load_optimizer(self, saved: State) -> None:
        for name, parameter in self._parameters.items():
            for key, value in optimizer_state(saved, name).items():
                if self._stage:
                    rank, world = self._group.rank, self._group.world
                    deepspeed_state.write_optimizer_state(self._zero, parameter, key, value, rank, world)
                else:
                    self._optimizer.state[parameter][key].copy_(value)


def _open_engine(network: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], group: Group) -> Any:
    """Open DeepSpeed's engine in the existing process group."""
    deepspeed = import_deepspeed(group.device)
    os.environ["LOCAL_RANK"] = str(read_environment().local_rank)  # DeepSpeed reads it, also without a launcher
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed.init_distributed("gloo" if group.device.type == "cpu" else "nccl")
        return deepspeed.initialize(model=network, optimizer=optimizer, config=settings)[0]


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, with its warnings and log silenced."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It calls collectives by deprecated names, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for module, name in _UNUSED.items():
        empty = module_from_spec(ModuleSpec(module, loader=None))
        setattr(empty, name, type(name, (), {}))
        sys.modules.setdefault(module, empty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # An operation for inference that takes a minute to compile. On a GPU it is not used, and to touch this table
        # would have every rank try which of all operations the CUDA compiler can build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
