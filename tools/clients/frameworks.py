"""Training loops that other libraries own: where each lets us save, kill and resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import elastickpt as ek
from tools.clients.case import STEPS, Case, Life, batch, model, states_of


def _accelerate(life: Life) -> object:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    state = {"model": net, "optimizer": optimizer, "scheduler": scheduler, "rng": ek.RNG()}
    life.load(state)
    for number in range(life.first, STEPS):
        inputs = batch(number)
        optimizer.zero_grad()
        accelerator.backward(((net(inputs) - inputs) ** 2).mean() + torch.rand(()) * 0)
        optimizer.step()
        scheduler.step()
        life.stepped(state, number + 1)
    return dict(net.state_dict()), states_of(optimizer), scheduler.get_last_lr(), torch.rand(3)


def _peft(life: Life) -> object:
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(model(), LoraConfig(r=4, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([one for one in net.parameters() if one.requires_grad])
    state = {"adapters": ek.trainable(net), "optimizer": optimizer}
    life.load(state)
    for number in range(life.first, STEPS):
        inputs = batch(number)
        optimizer.zero_grad()
        ((net(inputs) - inputs) ** 2).mean().backward()
        optimizer.step()
        life.stepped(state, number + 1)
    return dict(net.state_dict()), states_of(optimizer)


class _Rows(torch.utils.data.Dataset[Any]):
    """One batch an index, from the step with which a life begins."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __len__(self) -> int:
        return STEPS - self.first

    def __getitem__(self, index: int) -> Any:
        return batch(self.first + index)


def _lightning(life: Life) -> object:
    import lightning

    class Net(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, inputs: torch.Tensor) -> Any:
            return ((self.net(inputs[0]) - inputs[0]) ** 2).mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters())
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]

    class Keep(lightning.Callback):  # type: ignore[misc]
        done = life.first

        def state(self, trainer: Any, module: Any) -> dict[str, Any]:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            return {"model": module, "optimizers": trainer.optimizers, "schedulers": schedulers}

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            life.load(self.state(trainer, pl_module))

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if self.done > life.first:
                life.stepped(self.state(trainer, pl_module), self.done)
            self.done += 1

    net = Net()
    loader = torch.utils.data.DataLoader(_Rows(life.first))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Keep()],
    )
    trainer.fit(net, loader)
    return dict(net.state_dict()), states_of(trainer.optimizers[0])


def _transformers(life: Life) -> object:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": ((self.net(inputs[0]) - inputs[0]) ** 2).mean()}

    class Keep(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **has: Any) -> None:
            life.load(_entries(has))

        def on_step_end(self, args: Any, state: Any, control: Any, **has: Any) -> None:
            life.stepped(_entries(has), life.first + state.global_step)

    def _entries(has: dict[str, Any]) -> dict[str, Any]:
        return {"model": has["model"], "optimizer": has["optimizer"], "scheduler": has["lr_scheduler"], "rng": ek.RNG()}

    net = Net()
    options = TrainingArguments(
        output_dir=f"{life.path}.trainer",
        max_steps=STEPS - life.first,
        per_device_train_batch_size=1,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=net,
        args=options,
        train_dataset=_Rows(life.first),
        data_collator=lambda rows: {"inputs": torch.stack(rows)},
        callbacks=[Keep()],
    )
    trainer.train()
    return dict(net.state_dict()), states_of(trainer.optimizer)


def _ignite(life: Life) -> object:
    from ignite.engine import Engine, Events

    net = model()
    optimizer = torch.optim.AdamW(net.parameters())

    def update(_: Any, inputs: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = ((net(inputs[0]) - inputs[0]) ** 2).mean()
        loss.backward()
        optimizer.step()
        return float(loss)

    engine = Engine(update)
    state = {"model": net, "optimizer": optimizer}
    life.load(state)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda running: life.stepped(state, life.first + running.state.iteration)
    )
    engine.run(torch.utils.data.DataLoader(_Rows(life.first)), max_epochs=1)
    return dict(net.state_dict()), states_of(optimizer)


def _skorch(life: Life) -> object:
    from skorch import NeuralNet

    class Keep:
        def __init__(self) -> None:
            self.done = life.first

    keep = Keep()

    class Net(NeuralNet):  # type: ignore[misc]
        def get_loss(self, y_pred: Any, y_true: Any, X: Any = None, training: bool = False) -> Any:
            return ((y_pred - X) ** 2).mean()

    def entries(net: Any) -> dict[str, Any]:
        return {"model": net.module_, "optimizer": net.optimizer_}

    from skorch.callbacks import Callback

    class Saves(Callback):  # type: ignore[misc]
        def on_batch_end(self, net: Any, training: bool = False, **_: Any) -> None:
            if training:
                keep.done += 1
                life.stepped(entries(net), keep.done)

    net = Net(
        model,
        criterion=torch.nn.MSELoss,
        optimizer=torch.optim.Adam,
        max_epochs=1,
        batch_size=8,
        train_split=None,
        callbacks=[("saves", Saves())],
        verbose=0,
        iterator_train__shuffle=False,
    )
    net.initialize()
    life.load(entries(net))
    rows = torch.cat([batch(number) for number in range(life.first, STEPS)])
    net.partial_fit(rows, rows)
    return dict(net.module_.state_dict()), states_of(net.optimizer_)


def cases(library: str) -> Iterator[Case]:
    """Those of one library; none of another one."""
    yield from (case for case in _CASES if case.package == library)


_CASES = (
    Case("accelerate", "prepare(model, AdamW, StepLR)", _accelerate, (1, 2)),
    Case("peft", "LoRA by ek.trainable", _peft),
    Case("lightning", "Trainer.fit, a callback saves", _lightning),
    Case("transformers", "Trainer.train, a callback saves", _transformers),
    Case("pytorch-ignite", "Engine.run, a handler saves", _ignite),
    Case("skorch", "NeuralNet.partial_fit, a callback saves", _skorch),
)
