"""What KubeRay 1.7.0's CRDs (ray.io/v1) and Kubernetes' pods allow, as far as our files use them.

Stated from the CRDs by name and type. Nothing else passes, so that a key which is misspelt, or stands in another place,
is found here and not by the cluster.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}


def keys(required: str = "", **properties: Schema) -> Schema:
    """An object that has these keys and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": required.split()}


def each(item: Schema) -> Schema:
    """A list that is not empty."""
    return {"type": "array", "items": item, "minItems": 1}


RESOURCES = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = keys(
    "name image",
    name=TEXT,
    image=TEXT,
    env=each(keys("name value", name=TEXT, value=TEXT)),
    resources=keys(requests=RESOURCES, limits=RESOURCES),
    volumeMounts=each(keys("name mountPath", name=TEXT, mountPath=TEXT)),
    securityContext=keys(capabilities=keys(add=each(TEXT))),
)
VOLUME = keys(
    "name",
    name=TEXT,
    persistentVolumeClaim=keys("claimName", claimName=TEXT),
    configMap=keys("name", name=TEXT),
    emptyDir=keys(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
)
TOLERATION = keys(
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
POD = keys(
    "spec",
    spec=keys("containers", containers=each(CONTAINER), volumes=each(VOLUME), tolerations=each(TOLERATION)),
)
CLUSTER = keys(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=keys(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=keys(idleTimeoutSeconds=INTEGER),
    headGroupSpec=keys("template", rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=each(
        keys(
            "groupName minReplicas maxReplicas template",
            groupName=TEXT,
            replicas=INTEGER,
            minReplicas=INTEGER,
            maxReplicas=INTEGER,
            rayStartParams=TEXTS,
            template=POD,
        )
    ),
)
JOB = keys(
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=INTEGER,
    backoffLimit=INTEGER,
    rayClusterSpec=CLUSTER,
)


def kind_of_file(kind: str, spec: Schema) -> Schema:
    """A whole file."""
    metadata = keys("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"}, annotations=TEXTS)
    return keys(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


SCHEMAS = {"RayCluster": kind_of_file("RayCluster", CLUSTER), "RayJob": kind_of_file("RayJob", JOB)}
