"""The inputs that the editor gives a node, from its class's definition and its saved values. Pure.

A definition is an entry of ComfyUI's /object_info. Inputs of a widget's type become widgets, which take their values from
`widgets_values` in order. The others become sockets. Some widgets add inputs: a seed its `control_after_generate`, a dynamic
combo the inputs of the chosen option.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from worker.comfyui_data import known
from worker.editor.javascript import text_of
from worker.errors import UiWorkflowInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from worker.editor.saved_workflow import SavedNode

Definition: TypeAlias = "Mapping[str, Any]"
"""One class as /object_info describes it."""


class FrontendDialect(enum.Enum):
    """How ComfyUI's frontend saves and restores widgets, by the version that was observed."""

    CLASSIC = "1.32"
    MODERN = "1.58"


_FIRST_MODERN = (1, 45)  # between the two observed versions; the exact release of each change is unknown
_VERSION = re.compile(r"v?(\d{1,6})\.(\d{1,6})")


def dialect_of(frontend: str | None, object_info: Mapping[str, Any]) -> FrontendDialect:
    """Return how a frontend handles widgets, by its version in `/system_stats` (`required_frontend_version`).

    Without a version /object_info decides: engines that pin a modern frontend describe every class with
    `has_intermediate_output`.
    """
    if frontend and (found := _VERSION.match(frontend)):
        return FrontendDialect.MODERN if (int(found[1]), int(found[2])) >= _FIRST_MODERN else FrontendDialect.CLASSIC
    first = next((entry for entry in object_info.values() if isinstance(entry, dict)), {})
    return FrontendDialect.MODERN if "has_intermediate_output" in first else FrontendDialect.CLASSIC


# --- what a class declares ----------------------------------------------------------------------

DYNAMIC_COMBO, _DYNAMIC_GROUP = "COMFY_DYNAMICCOMBO_V3", "COMFY_DYNAMICGROUP_V3"
"""An input whose options add inputs of their own."""
_AUTOGROW, _MATCH_TYPE = "COMFY_AUTOGROW_V3", "COMFY_MATCHTYPE_V3"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input that a class declares. `type` is the socket's; `widget_type` decides about its widget."""

    name: str
    type: str
    widget_type: str
    options: Mapping[str, Any]

    @property
    def choices(self) -> Sequence[Any]:
        """Return a combo's options."""
        found = self.options.get("options")
        return found if isinstance(found, list) else ()

    def is_widget(self, dialect: FrontendDialect) -> bool:
        """Return whether the editor shows a widget for it."""
        editor = known().editor
        widgets = editor.modern_widgets if dialect is FrontendDialect.MODERN else editor.classic_widgets
        return self.widget_type in widgets and not self.options.get("forceInput")

    def has_control(self) -> bool:
        """Return whether a `control_after_generate` follows: declared, or a seed by its name that does not refuse it."""
        asked = self.options.get("control_after_generate")
        if self.widget_type == "INT" and asked is None:
            return self.name in known().editor.seeds
        return self.widget_type in {"INT", "COMBO"} and bool(asked)

    def refuses_control(self) -> bool:
        """Return whether it is a seed by its name that declares no `control_after_generate`."""
        return (
            self.widget_type == "INT"
            and self.name in known().editor.seeds
            and self.options.get("control_after_generate") is False
        )

    def default(self) -> object:
        """Return the value of a new node's widget, or `UNSET`."""
        given = self.options.get("default")
        match self.widget_type:
            case "COMBO":
                if self.options.get("multi_select"):
                    return []
                return given or next(iter(self.choices), UNSET)
            case "INT" | "FLOAT":
                return 0 if given is None else given
            case "BOOLEAN":
                return False if given is None else given
            case "COLOR":
                return "#000000" if given is None else given
            case _:
                return known().editor.defaults.get(self.widget_type, "") if given is None else given


UNSET = object()
"""A widget without a value: its input is absent from the prompt."""


def read_spec(name: str, raw: object) -> InputSpec:
    """Return the input that a class declares in /object_info: `[type or list of options, options?]`.

    Anything else becomes a socket that accepts all.
    """
    kind, options = (raw[0], raw[1] if len(raw) > 1 else {}) if isinstance(raw, (list, tuple)) and raw else ("*", {})
    if not isinstance(options, dict):
        options = {}
    if isinstance(kind, list):
        kind, options = "COMBO", {**options, "options": kind}
    if not isinstance(kind, str):
        kind = "*"
    widget_type = options.get("widgetType")
    return InputSpec(name, kind, widget_type if isinstance(widget_type, str) else kind, options)


def read_specs(definition: Definition) -> tuple[InputSpec, ...]:
    """Return the inputs and widgets of a class in the editor's order: required, optional, each in `input_order`, the others."""
    inputs, order = _object(definition.get("input")), _object(definition.get("input_order"))
    held = {section: _object(inputs.get(section)) for section in ("required", "optional")}
    names: dict[str, object] = {}
    for section, specs in held.items():
        ordered = order.get(section)
        for name in ordered if isinstance(ordered, list) else ():
            if isinstance(name, str) and name in specs:
                names.setdefault(name, specs[name])
    for specs in held.values():
        for name, raw in specs.items():
            names.setdefault(name, raw)
    return tuple(read_spec(name, raw) for name, raw in names.items())


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# --- what a node has ----------------------------------------------------------------------------


@dataclass(slots=True)
class Widget:
    """A widget of one node. `mode` is the value of its `control_after_generate`, or None."""

    spec: InputSpec
    name: str
    value: object
    in_prompt: bool = True
    mode: str | None = None

    @property
    def multiline(self) -> bool:
        """Return whether it is a text area, which converts every value to text."""
        return self.spec.widget_type == "STRING" and bool(self.spec.options.get("multiline"))


@dataclass(frozen=True, slots=True)
class ShapeSlot:
    """An input of a node by its class's definition, with or without a widget."""

    name: str
    type: str
    widget: str | None = None


@dataclass(slots=True)
class NodeShape:
    """All inputs and widgets of a node in the editor's order. A name that begins with one of `closed` exists only if listed.

    `left` are the saved values that no widget took, with their names if they were saved by name.
    """

    slots: list[ShapeSlot] = field(default_factory=list)
    widgets: list[Widget] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    left: list[tuple[str | None, object]] = field(default_factory=list)


def shape_of(node: SavedNode, specs: Sequence[InputSpec], dialect: FrontendDialect, *, foreign: bool = False) -> NodeShape:
    """Return the inputs and widgets of a node whose class declares `specs`, with its saved values.

    A `foreign` class is a custom node: its pack may show widgets for its own types, which the saved inputs reveal.
    """
    own = frozenset(slot.widget for slot in node.slots if slot.widget) if foreign else frozenset()
    return _Shaper(node, dialect, _SavedValues.of(node, specs, dialect), own).shape(specs)


@dataclass(slots=True)
class _SavedValues:
    """The saved values of a node's widgets, taken in order, or by name if a custom node's own code saved them so."""

    items: Sequence[Any] = ()
    named: Mapping[str, Any] | None = None
    taken: int = 0
    asked: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, node: SavedNode, specs: Sequence[InputSpec], dialect: FrontendDialect) -> _SavedValues:
        values = node.values
        if isinstance(values, dict):
            if any(spec.name in values for spec in specs):
                return cls(named=values)
            return cls(_in_key_order(values))
        if values is None:
            return cls()
        return cls(_without_forced_inputs([value for value in values if not _is_pack_note(value)], specs, dialect))

    def take(self, name: str, default: object) -> object:
        """Return the value for the next widget, which has this name."""
        self.asked.add(name)
        if self.named is not None:
            return self.named.get(name, default)
        if self.taken < len(self.items):
            self.taken += 1
            return self.items[self.taken - 1]
        return default

    def left(self) -> Iterator[tuple[str | None, object]]:
        """Yield the values that no widget took, with the names that they were saved by."""
        if self.named is not None:
            yield from ((name, value) for name, value in self.named.items() if name not in self.asked)
        else:
            yield from ((None, value) for value in self.items[self.taken :])


def _is_pack_note(value: object) -> bool:
    """Return whether the saved value is a pack's note about the text next to it, which belongs to no widget."""
    return isinstance(value, dict) and "textWidgetName" in value


def _in_key_order(values: dict[str, Any]) -> list[Any]:
    """Return the widgets' saved values from an object that stands for a list, in JavaScript's order of its keys."""
    indexed = sorted((int(key), value) for key, value in values.items() if re.fullmatch("[0-9]{1,4}", key))
    return [value for _, value in indexed] if indexed else list(values.values())


def _without_forced_inputs(values: list[Any], specs: Sequence[InputSpec], dialect: FrontendDialect) -> list[Any]:
    """Return widget values without those of forced inputs, for which frontends before 1.16 still saved a place."""
    forced: list[bool] = []
    for spec in specs:
        is_forced = bool(spec.options.get("forceInput"))
        if is_forced or spec.is_widget(dialect):
            counted = spec.options.get("control_after_generate") or (
                spec.widget_type == "INT" and spec.name in known().editor.seeds
            )
            forced.extend([is_forced, False] if counted else [is_forced])
    if not any(forced) or len(forced) != len(values):
        return values
    return [value for value, skip in zip(values, forced, strict=True) if not skip]


@dataclass(slots=True)
class _Shaper:
    node: SavedNode
    dialect: FrontendDialect
    values: _SavedValues
    own: frozenset[str] = frozenset()
    made: NodeShape = field(default_factory=NodeShape)

    def shape(self, specs: Sequence[InputSpec]) -> NodeShape:
        for spec in specs:
            self._socket(spec)
        for spec in specs:
            self._widget(spec)
        _add_extras(self.node, self.made, self.values, self.dialect)
        sockets = {slot.name for slot in self.made.slots}
        left = [(name, value) for name, value in self.values.left() if name not in sockets]
        # A file that was saved before a seed refused its control has one more value. The editor then shifts the others, too.
        self.made.left = left[: max(len(left) - sum(spec.refuses_control() for spec in specs), 0)]
        return self.made

    def _is_widget(self, spec: InputSpec) -> bool:
        return spec.is_widget(self.dialect) or (spec.name in self.own and not spec.options.get("forceInput"))

    def _socket(self, spec: InputSpec) -> None:
        if self._is_widget(spec):
            return
        modern = self.dialect is FrontendDialect.MODERN
        if modern and spec.type == _AUTOGROW:
            self._autogrow(spec)
        else:
            self.made.slots.append(ShapeSlot(spec.name, _match_type(spec) if modern else spec.type))

    def _widget(self, spec: InputSpec) -> None:
        if not self._is_widget(spec):
            return
        if spec.widget_type == _DYNAMIC_GROUP:
            raise UiWorkflowInvalid(
                f"node {self.node} has the dynamic group '{spec.name}', which only the editor can expand; "
                "export the workflow with 'Export (API)'"
            )
        if not spec.options.get("socketless"):
            self.made.slots.append(ShapeSlot(spec.name, spec.type, spec.name))
        if spec.widget_type == DYNAMIC_COMBO:
            self._dynamic_combo(spec)
            return
        widget = Widget(spec, spec.name, spec.default())
        if spec.widget_type not in known().editor.not_saved:
            widget.value = self._saved(spec, widget.value)
        widget.in_prompt = spec.widget_type not in {"IMAGEUPLOAD", "RESOLUTION_PREVIEW"}
        self.made.widgets.append(widget)
        self._followers(widget)

    def _saved(self, spec: InputSpec, default: object) -> object:
        value = self.values.take(spec.name, default)
        if value is None and self.dialect is FrontendDialect.MODERN and spec.widget_type == "COMBO" and default is not UNSET:
            return default
        return value

    def _followers(self, widget: Widget) -> None:
        spec = widget.spec
        if spec.has_control():
            mode = self.values.take("control_after_generate", "fixed")
            widget.mode = {True: "randomize", False: "fixed"}[mode] if isinstance(mode, bool) else str(mode)
        if spec.widget_type != "COMBO":
            return
        if spec.has_control():
            self.values.take("control_filter_list", "")
        remote = spec.options.get("remote")
        if isinstance(remote, dict):
            self.values.take("Auto-refresh after generation", default=False)
            if remote.get("refresh_button"):
                button = InputSpec("refresh", "STRING", "STRING", {})
                self.made.widgets.append(Widget(button, "refresh", self.values.take("refresh", "refresh")))

    def _dynamic_combo(self, spec: InputSpec) -> None:
        options = {
            option["key"]: _object(option.get("inputs"))
            for option in spec.choices
            if isinstance(option, dict) and isinstance(option.get("key"), str)
        }
        default = next(iter(options), UNSET)
        chosen = self.values.take(spec.name, default)
        values = self.values
        if chosen is None:
            # The inputs of the first option come back after the values were assigned, so they get none.
            chosen, self.values = default, _SavedValues()
        self.made.widgets.append(Widget(spec, spec.name, chosen))
        self.made.closed.append(f"{spec.name}.")
        for child in _children(spec.name, options.get(chosen, {}) if isinstance(chosen, str) else {}):
            self._socket(child)
            self._widget(child)
        self.values = values

    def _autogrow(self, spec: InputSpec) -> None:
        """Add a group of sockets with one more than are linked. A number or text among them is also a widget."""
        template = _object(spec.options.get("template"))
        declared = _object(template.get("input"))
        fields = [
            read_spec(name, raw) for section in ("required", "optional") for name, raw in _object(declared.get(section)).items()
        ]
        for ordinal in self._ordinals(spec, template):
            for inner in fields:
                base = _member(template, inner.name if len(fields) > 1 else None, ordinal)
                child = InputSpec(f"{spec.name}.{base}", inner.type, inner.widget_type, inner.options)
                if child.is_widget(self.dialect):
                    self._widget(child)
                else:
                    self._socket(child)

    def _ordinals(self, spec: InputSpec, template: Mapping[str, Any]) -> Iterable[int]:
        names = template.get("names")
        low, high = template.get("min", 1), len(names) if isinstance(names, list) else template.get("max", 100)
        low, high = (value if isinstance(value, int) else 1 for value in (low, high))
        saved = [self._ordinal(slot.name, spec.name, names) for slot in self.node.slots if slot.link is not None]
        linked = max((ordinal for ordinal in saved if ordinal is not None), default=-1)
        return range(min(max(low + 1, 1, linked + 2), high))

    @staticmethod
    def _ordinal(name: str, group: str, names: object) -> int | None:
        if not name.startswith(f"{group}."):
            return None
        member = name[len(group) + 1 :]
        if isinstance(names, list):
            return names.index(member) if member in names else None
        digits = re.search(r"[0-9]{1,4}$", member)
        return int(digits[0]) if digits else None


def _children(prefix: str, inputs: Mapping[str, Any]) -> Iterator[InputSpec]:
    for section in ("required", "optional"):
        for name, raw in _object(inputs.get(section)).items():
            yield read_spec(f"{prefix}.{name}", raw)


def _member(template: Mapping[str, Any], key: str | None, ordinal: int) -> str:
    names = template.get("names")
    if isinstance(names, list):
        return str(names[ordinal])
    return f"{template.get('prefix', '') if key is None else key}{ordinal}"


def _match_type(spec: InputSpec) -> str:
    allowed = _object(spec.options.get("template")).get("allowed_types")
    return allowed if spec.type == _MATCH_TYPE and isinstance(allowed, str) else spec.type


# --- what the editor's own extensions add to a class --------------------------------------------

_MAX_OPTIONS = 1_000


def _add_extras(node: SavedNode, made: NodeShape, values: _SavedValues, dialect: FrontendDialect) -> None:
    # Classic frontends send these too. They are no inputs of the class, and ComfyUI ignores them.
    if dialect is FrontendDialect.CLASSIC and node.type in known().editor.audio_players:
        _extra(made, "audioUI", "")
    if dialect is FrontendDialect.CLASSIC and node.type == "PreviewAny":
        _extra(made, "preview", "")
    if node.type in {"SaveGLB", "Preview3D"}:
        _extra(made, "image", "")
    if node.type == "CustomCombo":
        _add_combo_widgets(made, values)


def _extra(made: NodeShape, name: str, value: object) -> None:
    if all(widget.name != name for widget in made.widgets):
        made.widgets.append(Widget(InputSpec(name, "STRING", "STRING", {}), name, value))


def _add_combo_widgets(made: NodeShape, values: _SavedValues) -> None:
    """Add the widgets of a custom combo's options, as the editor does, and `index`, the position of the choice among them."""
    values.take("index", None)
    if len(values.items) > _MAX_OPTIONS:
        raise UiWorkflowInvalid(f"a CustomCombo has more than {_MAX_OPTIONS} options")
    options = [text_of(value) for value in values.items[values.taken :]]
    if not options or options[-1]:
        options.append("")
    choice = made.widgets[0].value if made.widgets else UNSET
    _extra(made, "index", options.index(choice) if isinstance(choice, str) and choice in options else -1)
    for number, option in enumerate(options, 1):
        _extra(made, f"option{number}", option)


def upload_widget_value(spec: InputSpec, value: object) -> object:
    """Return a file chooser's widget value as a classic frontend changes it: a path, marked if it is in the output folder."""
    if spec.widget_type != "COMBO" or not any(spec.options.get(key) for key in known().editor.uploads):
        return value
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict):
        folder, name = value.get("subfolder"), value.get("filename")
        value = f"{folder}/{name}" if folder else name
    if value in (None, "", UNSET):
        value = spec.default()
    if (
        spec.options.get("image_folder") == "output"
        and isinstance(value, str)
        and not re.search(r"\[(in|out)put\]|\[temp\]", value)
    ):
        return f"{value} [output]"
    return value
