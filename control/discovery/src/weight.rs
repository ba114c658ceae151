//! About how many bytes things take, in memory and as JSON, where bounds need no more than that.

use flynn_api::discovery::Instance;
use serde_json::Value;

/// Of a node beside its text.
const NODE: usize = 32;

/// An instance.
pub fn instance(of: &Instance) -> usize {
    let labels = of.meta.iter();
    let labels = labels.map(|(key, value)| key.len() + value.len() + NODE);
    of.id.len() + of.addr.len() + of.proto.len() + labels.sum::<usize>()
}

/// Any JSON.
pub fn json(of: &Value) -> usize {
    NODE + match of {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(json).sum(),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, field)| NODE + name.len() + json(field))
            .sum(),
    }
}
