"""The base class of all configs: what every notebook has, and how a bad value is reported."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, field_validator
from pydantic.fields import FieldInfo

from kd_utils.config import fields, notebook_files, project_paths
from kd_utils.config.executed_cells import Execution

#: Names, places and devices: parameters that no fingerprint contains and no grid may sweep.
NEVER_IN_A_RESULT = frozenset(
    {"name", "artifacts_dir", "run_dir", "trial", "device", "save_student", "checkpoint_seconds"}
)


class Config(BaseModel):
    """A notebook's parameters, frozen and checked before anything is loaded.

    Raises:
        ValueError: one line with every wrong parameter, its value and what is allowed.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    #: The notebook whose parameters these are.
    notebook: ClassVar[str] = ""

    #: Parameters that `add_parameter` added, which a notebook may leave out.
    added: ClassVar[set[str]] = set()

    name: fields.Name = "toy"
    artifacts_dir: fields.Place = "artifacts"

    _execution: Execution | None = PrivateAttr(None)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(fields.in_one_line(error, type(self))) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_conversion(cls, value: Any, info: Any) -> Any:
        """Refuse what pydantic would convert, and text that files and libraries cannot hold."""
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and kind in (int, float):
            raise ValueError("Input should be a number, not true or false")
        is_word = isinstance(value, str) and value.lower() in ("true", "false")  # papermill's -p
        if kind is bool and not isinstance(value, bool) and not is_word:
            raise ValueError(f"Input should be true or false, got {fields.kind_of(value)}")
        if isinstance(value, bytes) and kind in (int, float):
            raise ValueError(f"Input should be a number, got {fields.kind_of(value)}")
        if isinstance(value, bytes) or (
            isinstance(value, str) and re.search(r"[\0\ud800-\udfff]", value)
        ):
            raise ValueError("Input should be plain text: no bytes, no NUL, no lone surrogates")
        return value

    @classmethod
    def add_parameter(cls, name: str, annotation: Any, default: Any) -> None:
        """Add a parameter from outside the package, for a term or a signal defined there.

        Args:
            name: as notebooks and parameter files write it.
            annotation: type and marks, such as `Annotated[Weight, UsedBy("my_term")]`.
            default: the value where a notebook's `parameters` cell does not assign the name.
        """
        cls.added.add(name)
        cls.__annotations__[name] = annotation
        cls.__pydantic_fields__[name] = FieldInfo.from_annotated_attribute(annotation, default)
        cls.model_rebuild(force=True)

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> Self:
        """The config from a notebook's `globals()`, after papermill injected its parameters.

        Raises:
            ValueError: a value is wrong, a parameter is missing, or an injected key is declared by
                no notebook or was assigned again.
        """
        cells = namespace.get("In", [])
        known = {*notebook_files.declared_names(), *cls.model_fields}
        notebook_files.refuse_unknown_keys(
            notebook_files.injected_names(cells), "injected parameters", known
        )
        if missing := cls.not_in(namespace):
            raise ValueError(f"the parameters cell does not define {missing}: restore it")
        notebook_files.refuse_overwritten(cells, namespace)
        config = cls(**{key: namespace[key] for key in cls.model_fields if key in namespace})
        config._execution = Execution(cls.notebook, f"{cls.__name__}.from_notebook(globals())")
        return config

    def require_unbroken(self) -> None:
        """Refuse to write what did not come from one whole, unbroken execution of the notebook.

        Raises:
            ValueError: says which cell was left out, edited, interrupted or run out of turn since
                this config was made, and from which cell to run again (see `Execution`).
        """
        if self._execution:
            self._execution.require_unbroken()

    def require_as_saved(self) -> None:
        """Refuse to name a notebook's code that is not what runs (`Execution.require_as_saved`).

        Raises:
            ValueError: the notebook was saved with other cells after this config was made.
        """
        if self._execution:
            self._execution.require_as_saved()

    @classmethod
    def not_in(cls, values: dict[str, Any]) -> str:
        """The parameters that a notebook must assign and that `values` lacks, or ""."""
        missing = (key for key in cls.model_fields if key not in {*values, *cls.added})
        return ", ".join(missing)

    def __str__(self) -> str:
        width = max(map(len, type(self).model_fields))
        return "\n".join(f"{key:<{width}}  {value!r}" for key, value in self.model_dump().items())

    @property
    def artifacts(self) -> Path:
        return project_paths.project_path(self.artifacts_dir)

    @property
    def data_path(self) -> Path:
        """Folder of the prepared data, `artifacts/data/NAME`."""
        return self.artifacts / "data" / self.name

    @property
    def without_effect(self) -> set[str]:
        """Parameters that cannot change a result, because other parameters switch them off."""
        return set()

    def fingerprint(self) -> str:
        """Sixteen hex digits over all parameters except those that cannot change a result."""
        values = self.model_dump(exclude={*NEVER_IN_A_RESULT, *self.without_effect})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
