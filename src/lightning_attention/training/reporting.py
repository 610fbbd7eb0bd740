"""Trackers that a run reports to: TensorBoard, Weights & Biases and others, by the callbacks of transformers."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .processes import together

# Module and package of a tracker, where they do not have its name; transformers takes any of several modules.
MODULES: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Reporter(TrainerCallback):
    """Pass the events of a run on to a tracker; after an error of the tracker the run goes on without it.

    Args:
        name: name of the tracker.
        report: called with a line when the tracker is given up.

    Raises:
        ValueError: by the constructor or at the beginning of the training, if the tracker cannot be used.
    """

    def __init__(self, name: str, report: Callable[[str], None]):
        self.name, self.report = name, report
        try:
            self.tracker: TrainerCallback | None = INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # of any kind, from the package of the tracker
            raise self._unusable(error) from error

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        def begin() -> Any:
            try:
                return self.tracker and self.tracker.on_train_begin(args, state, control, **kwargs)
            except Exception as error:
                raise self._unusable(error) from error

        return together(begin)

    def _unusable(self, error: Exception) -> ValueError:
        message = " ".join(str(error).split()) or type(error).__name__
        return ValueError(f"report_to {self.name!r} cannot be used: {message}")


def _passed_on(event: str) -> Callable[..., Any]:
    def handle(self: Reporter, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self.tracker, event)(*args, **kwargs) if self.tracker else None
        except Exception as error:
            self.tracker = None
            message = " ".join(str(error).split()) or type(error).__name__
            self.report(f"warning: no longer reporting to {self.name}, which failed: {message}")

    return handle


for event in EVENTS:
    if event not in vars(Reporter):
        setattr(Reporter, event, _passed_on(event))


def reporters(names: Iterable[str], report: Callable[[str], None]) -> list[TrainerCallback]:
    """Make the callbacks that report to trackers.

    Args:
        names: names of trackers, see `report_names`.
        report: called with a line when a tracker fails during the run.

    Raises:
        ValueError: a name is unknown, its package is not installed, or it cannot be used.
    """
    return [_reporter(name, report) for name in names]


def _reporter(name: str, report: Callable[[str], None]) -> Reporter:
    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(f"report_to must be among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}")
    modules = MODULES.get(name, (name,))
    if modules and not any(map(find_spec, modules)):
        package = PACKAGES.get(name, name)
        raise ValueError(f"report_to {name!r} needs a package that is not installed: run pip install {package}")
    return Reporter(name, report)


def report_names(names: object) -> tuple[str, ...]:
    """Convert one name of a tracker or several to a tuple; "none" alone is no tracker.

    Raises:
        TypeError: `names` is neither a name nor several.
        ValueError: a name is given twice, or "none" beside others.

    Example:
        >>> from lightning_attention.training.reporting import report_names
        >>> report_names("tensorboard"), report_names(["none"])
        (('tensorboard',), ())
    """
    given = (names,) if isinstance(names, str) else names
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"report_to must be names of trackers, got {names!r}")
    if len(set(given)) < len(given) or ("none" in given and len(given) > 1):
        raise ValueError(f"report_to must name trackers once each, or be 'none', got {', '.join(map(repr, given))}")
    return () if given == ("none",) or list(given) == ["none"] else tuple(given)
