"""The schema of reports: section `track`."""

from dataclasses import dataclass
from typing import Any

from distrain.config.options import Section, option
from distrain.errors import UserError

NO_MLFLOW = "none"  # track.uri: keep metrics in the run's folder only


@dataclass
class TrackConfig(Section):
    uri: str = option(
        "",
        "MLflow tracking URI, or none; empty: $MLFLOW_TRACKING_URI, else a database in run.dir",
        location=True,
        on_resume="free",
    )
    experiment: str = option("distrain", "MLflow experiment", on_resume="free")
    models: bool = option(
        True, "log the best and the final model of a finished run to MLflow, with their weights", on_resume="free"
    )
    register: str = option(
        "",
        "name in MLflow's model registry for the best model of a finished run; empty: not registered",
        on_resume="free",
    )
    parent: str = option(
        "", "name of the sweep that the run belongs to, whose MLflow run is its parent; empty: none", on_resume="free"
    )
    params: dict[str, Any] = option({}, "more parameters of the MLflow run, by name", on_resume="free")
    every_steps: int = option(
        10, "steps between reports of loss, accuracy, learning rate and throughput", min=1, on_resume="free"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.experiment:
            raise UserError("track.experiment is empty: name one")
        if "/" in self.register or ":" in self.register:
            raise UserError(f"track.register={self.register}: MLflow's registry takes no name with '/' or ':'")
        if self.register and not self.models:
            raise UserError(f"track.register={self.register} needs track.models=true")
        if self.register and self.uri == NO_MLFLOW:
            raise UserError(
                f"track.register={self.register} needs MLflow, and track.uri={NO_MLFLOW}: change one of them"
            )
