import dagster as dg

from colorfilter.errors import InputError
from pipelines.run import failure_of


def outcome(severity: dg.AssetCheckSeverity, error: Exception) -> object:
    """Of a run in which a check of one asset fails, and another asset raises."""

    @dg.asset
    def checked() -> None:
        pass

    @dg.asset(deps=[checked])
    def broken() -> None:
        raise error

    @dg.asset_check(asset=checked, blocking=True)
    def check() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=False, severity=severity, description="as it is")

    defs = dg.Definitions(assets=[checked, broken], asset_checks=[check])
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(raise_on_error=False)
    failure = failure_of(result)
    return failure.message, failure.input_is_wrong


def test_a_check_that_only_warns_is_not_why_a_run_failed() -> None:
    warned = outcome(dg.AssetCheckSeverity.WARN, RuntimeError("a worker was killed"))
    assert warned == ("broken: RuntimeError: a worker was killed", False)
    assert outcome(dg.AssetCheckSeverity.WARN, InputError("no such file")) == ("no such file", True)


def test_a_check_that_blocks_is_why_a_run_failed() -> None:
    message = "check check of checked: as it is"
    assert outcome(dg.AssetCheckSeverity.ERROR, RuntimeError("never raised")) == (message, True)
