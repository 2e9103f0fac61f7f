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

    name: fields.Name
    artifacts_dir: fields.Place

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
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("Input should be a number, not true or false")
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
        cls.__annotations__[name] = annotation
        cls.__pydantic_fields__[name] = FieldInfo.from_annotated_attribute(annotation, default)
        cls.model_rebuild(force=True)

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> Self:
        """The config from a notebook's `globals()`, after papermill injected its parameters.

        Raises:
            ValueError: a value is wrong, a parameter is missing, or an injected key is declared by
                no notebook.
        """
        injected = notebook_files.injected_names(namespace.get("In", []))
        notebook_files.refuse_unknown_keys(injected, "injected parameters", cls.model_fields)
        required = [key for key, field in cls.model_fields.items() if field.is_required()]
        if missing := ", ".join(key for key in required if key not in namespace):
            raise ValueError(f"the parameters cell does not define {missing}: restore it")
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
