"""Page that lists the routes of the service. It needs no network and no program in the browser."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Recurrent BART: requests</title>
<style>
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.5 }
body { max-width: 60rem; margin: auto; padding: 1rem }
code, pre { font-size: 0.9em } pre { overflow-x: auto; border-left: 3px solid gray; padding-left: 1rem }
</style></head><body>
<h1>Recurrent BART: requests</h1>
<p>For programs: <a href="openapi.json">openapi.json</a>.</p>"""


def without_validation_errors(openapi: dict[str, Any]) -> dict[str, Any]:
    """Remove status 422, which FastAPI lists for all parameters, from an OpenAPI description, and return it.

    The service answers wrong parameters with 400.
    """
    for operations in openapi["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        openapi.get("components", {}).get("schemas", {}).pop(name, None)
    return openapi


def docs_page(openapi: Mapping[str, Any]) -> str:
    """Return the page for an OpenAPI description."""
    schemas = openapi.get("components", {}).get("schemas", {})
    parts = [
        _operation(method, path, operation, schemas)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    ]
    return "\n".join([HEAD, *parts, "</body></html>\n"])


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    title, text = f"{method.upper()} {path}", operation.get("description", "")
    parts = [f"<h2><code>{escape(title)}</code></h2>", f"<p>{escape(text)}</p>"]
    parameters = [(item["name"], item["schema"], item["in"]) for item in operation.get("parameters", ())]
    if parameters:
        items = [f"<li><code>{name}</code> ({place}): {_meaning(schema)}</li>" for name, schema, place in parameters]
        parts.append(f"<ul>{''.join(items)}</ul>")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body, <code>{kind}</code>:</p>{_fields(content['schema'], schemas)}")
    for status, answer in operation["responses"].items():
        for kind, content in answer.get("content", {}).items():
            # all errors have the same fields
            fields = _fields(content.get("schema", {}), schemas) if status < "300" else ""
            parts.append(f"<p>Answer {status}, <code>{kind}</code></p>{fields}")
    return "\n".join(parts)


def _fields(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    while "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[-1]]
    shown = {name: _meaning(field) for name, field in schema.get("properties", {}).items()}
    return f"<pre>{json.dumps(shown, indent=2)}</pre>" if shown else f"<pre>{_meaning(schema)}</pre>" if schema else ""


def _meaning(schema: Mapping[str, Any]) -> str:
    limits = [f"{word} {schema[name]:g}" for name, word in (("minimum", "from"), ("maximum", "to")) if name in schema]
    return escape(" ".join([schema.get("type", "any"), *limits, schema.get("description", "")]).strip(), quote=False)
