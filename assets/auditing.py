"""Checks of an audit that every filtered dataset is put to, without reading the whole corpus."""

from collections.abc import Iterable

import dagster as dg

from assets.counted import counts
from colorfilter.recipe import Arm, Domain, Recipe
from resources.artifacts import ArtifactStore
from resources.audit import Finding, Record


def audit_checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """`audit_lineage` and `audit_contents` for every domain and arm."""
    return [
        check
        for domain in recipe.domains
        for arm in recipe.arms
        for check in (_lineage(domain, arm), _contents(domain, arm))
    ]


def _lineage(domain: Domain, arm: Arm) -> dg.AssetChecksDefinition:
    name = f"{domain.name}/{arm.name}/filtered_dataset"

    @dg.asset_check(asset=dg.AssetKey(name.split("/")), name="audit_lineage")
    def audit_lineage(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """The ledger's chain holds, and links the dataset to all that it was made from."""
        record = Record(artifacts)
        made = record.lineage.ancestry([artifacts.entries()[name, None]])
        findings = [*record.chain(), *record.reuse(), *record.links(made.values())]
        return _result(findings, f"{len(made):,} artefacts back to raw files, head {record.head}")

    return audit_lineage


def _contents(domain: Domain, arm: Arm) -> dg.AssetChecksDefinition:
    name = f"{domain.name}/{arm.name}/filtered_dataset"

    @dg.asset_check(asset=dg.AssetKey(name.split("/")), name="audit_contents")
    def audit_contents(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """The dataset's files hash to what is on record, and hold what was selected."""
        record = Record(artifacts)
        entry = artifacts.entries()[name, None]
        findings = [
            *record.files([entry]),
            *counts(artifacts.at.root, record.lineage, [entry]),
        ]
        size = f"{entry['facts']['sequences']:,} sequences as selected"
        return _result(findings, size)

    return audit_contents


def _result(findings: Iterable[Finding], holds: str) -> dg.AssetCheckResult:
    broken = [str(finding) for finding in findings if not finding.warning]
    return dg.AssetCheckResult(
        passed=not broken,
        description=f"{len(broken)} things do not hold, the first: {broken[0]}"
        if broken
        else holds,
        metadata={"findings": dg.MetadataValue.json(broken[:20])} if broken else {},
    )
