"""Loading a recipe from YAML and resolving its paths.

Unknown keys and invalid values are refused with the field's path and a fix. Paths may contain
environment variables, `{stdlib}` and `{packages}` (the folders of this Python's standard library
and of its installed packages). Relative paths are relative to the recipe's folder, so a recipe
means the same in every working directory.
"""

import glob
import os
import re
import sysconfig
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from colorfilter.config.recipe import Domain, Recipe, Source, Task
from colorfilter.errors import InputError

# Placeholders in paths, and their names in sysconfig.
FOLDERS = {"{stdlib}": "stdlib", "{packages}": "purelib"}


def load(path: Path, sources: bool = True) -> Recipe:
    """Read a recipe from a YAML file.

    `sources=False` leaves the paths of sources as written, for callers that open none. Raises
    InputError, one line, for a file that is missing, not YAML or not a valid recipe.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise InputError(
            f"recipe {path}: not valid YAML ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"recipe {path}: must be a mapping of keys to values")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"recipe {path}: {first_problem(error)}") from error
    folder = path.resolve().parent
    recipe = _with_model_paths(recipe, folder)
    return _with_source_paths(recipe, folder) if sources else recipe


def as_text(recipe: Recipe) -> str:
    """Return a recipe as YAML, without default values and with resolved paths.

    Loading the text gives the same recipe.
    """
    facts = recipe.model_dump(mode="json", exclude_defaults=True)
    return str(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as 'field.path: what is wrong'."""
    problems = error.errors()
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "the recipe"
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "unknown key; remove it or correct its spelling"
    elif first["type"] == "missing":
        what = "missing; add it"
    elif not isinstance(first["input"], dict | list | BaseModel):
        what += f" (got {first['input']!r})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {what}{more}"


def _with_model_paths(recipe: Recipe, folder: Path) -> Recipe:
    def local(path: str | None, where: str) -> str | None:
        # A hub name such as 'EleutherAI/pythia-160m' has no leading dot or slash; keep it.
        if path is None or not path.startswith((".", "/", "~", "$", "{")):
            return path
        return _expand(path, folder, where)

    prior = recipe.prior.model_copy(update={"path": local(recipe.prior.path, "prior.path")})
    tokenizer = recipe.tokenizer.model_copy(
        update={"path": local(recipe.tokenizer.path, "tokenizer.path")}
    )
    return recipe.model_copy(update={"prior": prior, "tokenizer": tokenizer})


def _with_source_paths(recipe: Recipe, folder: Path) -> Recipe:
    beside = Path(glob.escape(str(folder)))

    def source(s: Source, where: str) -> Source:
        files = _expand(s.files, beside, f"{where}.{s.name}.files")
        exclude = [_fill_in(pattern, f"{where}.{s.name}.exclude") for pattern in s.exclude]
        return s.model_copy(update={"files": files, "exclude": exclude})

    def task(t: Task, where: str) -> Task:
        files = {"train": t.train, "test": t.test}
        expanded = {
            part: path and _expand(path, beside, f"{where}.{t.name}.{part}")
            for part, path in files.items()
        }
        return t.model_copy(update=expanded)

    def domain(d: Domain) -> Domain:
        where = f"domains.{d.name}"
        sources, tasks = [source(s, where) for s in d.sources], [task(t, where) for t in d.tasks]
        return d.model_copy(update={"sources": sources, "tasks": tasks})

    corpus = recipe.corpus.model_copy(
        update={"sources": [source(s, "corpus.sources") for s in recipe.corpus.sources]}
    )
    domains = [domain(d) for d in recipe.domains]
    return recipe.model_copy(update={"corpus": corpus, "domains": domains})


def _fill_in(path: str, where: str) -> str:
    """Return a path with its placeholders and environment variables replaced."""
    for name, key in FOLDERS.items():
        path = path.replace(name, sysconfig.get_path(key))
    filled = os.path.expandvars(path)
    unset = re.search(r"\$\{?(\w+)", filled)
    if unset:
        raise InputError(
            f"recipe: {where}: the environment variable {unset.group(1)} is not set; set it to "
            "the folder that contains the data"
        )
    return filled


def _expand(path: str, folder: Path, where: str) -> str:
    expanded = _fill_in(path, where)
    if "://" in expanded:
        return expanded
    try:
        return str(folder / Path(expanded).expanduser())
    except RuntimeError as error:
        raise InputError(
            f"recipe: {where}: {path}: no such user; write the full path instead"
        ) from error
