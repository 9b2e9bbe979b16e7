"""JSON Schema of a user's TOML files, from their pydantic models: for editors, and for the pages of keys in docs/."""

from __future__ import annotations

import tomllib
from typing import Any

from pydantic import BaseModel


def json_schema(root: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a file whose tables `root` describes.

    Examples of a model are TOML; here they are values.  TOML has no null: a key without a value is left out.
    """
    schema: dict[str, Any] = _plain(root.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _plain(node: Any) -> Any:
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, dict):
        return node
    made = {key: _plain(value) for key, value in node.items()}
    if "examples" in made and all(isinstance(example, str) for example in made["examples"]):
        made["examples"] = [tomllib.loads(f"value = {example}")["value"] for example in node["examples"]]
    if made.get("default", 0) is None:
        del made["default"]
    # pydantic's own title of a key is the key.
    if isinstance(made.get("title"), str) and ("type" in made or "anyOf" in made) and "properties" not in made:
        del made["title"]
    kinds = made.get("anyOf")
    if isinstance(kinds, list) and {"type": "null"} in kinds:
        kinds = [kind for kind in kinds if kind != {"type": "null"}]
        del made["anyOf"]
        made = {**kinds[0], **made} if len(kinds) == 1 else {**made, "anyOf": kinds}
    return made
