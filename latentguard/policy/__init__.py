"""Policies: which concepts to look for, at which threshold, and what to do about a match.

A policy is one YAML file; docs/policies.md describes every key. What is loaded is frozen and
complete: `Policy.to_dict()` is the same as JSON-able data, which is all that `latentguard.judge`
needs. Calibrated thresholds lie beside the policy in NAME.lock.yaml.

fields: what each kind of value accepts. taxonomies: published hazard schemes. models: Policy and
its parts. lock: calibrated thresholds.
loading: files to policies. problems: what is wrong, in sentences. latentguard/yaml_nodes.py reads
untrusted YAML to values that know their lines.
"""

from latentguard.policy.fields import SCHEMA_VERSION
from latentguard.policy.loading import (
    json_schema,
    lines_of,
    load_policy,
    parse_policy,
    shipped_policies,
)
from latentguard.policy.lock import (
    CalibratedMargin,
    Lock,
    LockEntry,
    load_lock,
    lock_path,
    parse_lock,
    write_lock,
)
from latentguard.policy.models import BlockSettings, Concept, Policy, Schedule, Steer, Threshold
from latentguard.policy.taxonomies import Scheme, schemes

__all__ = [
    "SCHEMA_VERSION",
    "BlockSettings",
    "CalibratedMargin",
    "Concept",
    "Lock",
    "LockEntry",
    "Policy",
    "Schedule",
    "Scheme",
    "Steer",
    "Threshold",
    "json_schema",
    "lines_of",
    "load_lock",
    "load_policy",
    "lock_path",
    "parse_lock",
    "parse_policy",
    "schemes",
    "shipped_policies",
    "write_lock",
]
