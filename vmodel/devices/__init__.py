"""The built-in models, by the name that a machine file uses; imported only when asked for."""

BUILTIN: dict[str, str] = {
    "edu": "vmodel.devices.edu:Edu",
    "idio16": "vmodel.devices.idio16:Idio16",
}
