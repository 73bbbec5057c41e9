"""What a finished sweep leaves: its report, in its folder and in MLflow."""

from collections.abc import Callable
from pathlib import Path

from distrain.config import Config
from distrain.config.tracking import NO_MLFLOW
from distrain.sweep.population import Member, by_space
from distrain.sweep.report import describe, write_report
from distrain.sweep.sweep import Sweep
from distrain.track.mlflow_runs import SWEEP_TAG, connect, find_or_create_experiment, find_or_create_run
from distrain.track.models import in_one_line
from distrain.track.uri import tracking_uri


def publish(sweep: Sweep, settings: Config, info: Callable[[str], None]) -> None:
    """Write `report/` in the sweep's folder and attach it to the parent run in MLflow. Raises OSError.

    `settings` are those of the members' runs. A server that cannot be reached is reported in a line.
    """
    page = sweep.folder / "report" / "index.html"
    members = sweep.current()
    spaces = by_space(members)
    page.parent.mkdir(exist_ok=True)
    write_report(spaces, page, {"sweep": str(sweep.folder)})
    for line in describe(spaces):
        info(line)
    info(f"report: {page}")
    uri = tracking_uri(settings)
    if uri == NO_MLFLOW:
        return
    try:
        _log(uri, settings.track.experiment, sweep, members, page.parent)
    except Exception as error:  # of any driver or server
        info(f"MLflow at {uri} has not received the report: {in_one_line(error)}; run the same command again")


def _log(uri: str, experiment: str, sweep: Sweep, members: list[Member], report: Path) -> None:
    client = connect(uri)
    experiment_id = find_or_create_experiment(client, uri, experiment, sweep.folder / "runs")
    run_id = find_or_create_run(client, experiment_id, SWEEP_TAG, sweep.name, sweep.name)
    errors = [member.error for member in members if member.status == "done" and member.error is not None]
    client.log_metric(run_id, "finished", len(errors))
    if errors:
        client.log_metric(run_id, "lowest_error", min(errors))
    client.log_artifacts(run_id, str(report), "report")
    client.set_terminated(run_id, "FINISHED")
