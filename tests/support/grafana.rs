//! The dashboards, and what Grafana makes of their texts before it asks Prometheus.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

pub struct Dashboard {
    pub file: String,
    pub json: Value,
}

/// All of them, by the names of their files.
pub fn dashboards() -> Vec<Dashboard> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboards");
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    let read = |path: std::path::PathBuf| {
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Dashboard { file: path.file_name().expect("a name").to_string_lossy().into_owned(), json }
    };
    files.into_iter().map(read).collect()
}

pub fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

impl Dashboard {
    pub fn uid(&self) -> &str {
        text(&self.json, "uid")
    }

    pub fn variables(&self) -> &[Value] {
        list(&self.json, "/templating/list")
    }

    /// All but rows, and those of closed rows as well.
    pub fn panels(&self) -> Vec<&Value> {
        let top = list(&self.json, "/panels").iter();
        let inside = |panel| [panel].into_iter().chain(list(panel, "/panels"));
        top.flat_map(inside).filter(|panel| text(panel, "type") != "row").collect()
    }

    /// With a URL or a part of one, wherever they stand.
    pub fn links(&self) -> Vec<&str> {
        fn walk<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
            match value {
                Value::Object(map) => {
                    found.extend(map.get("url").and_then(Value::as_str).filter(|url| !url.is_empty()));
                    map.values().for_each(|value| walk(value, found));
                }
                Value::Array(list) => list.iter().for_each(|value| walk(value, found)),
                _ => {}
            }
        }
        let mut found = Vec::new();
        walk(&self.json, &mut found);
        found
    }
}

/// With values for the variables, by name. The names of Grafana's own are given as others are.
pub fn interpolate(query: &str, values: &BTreeMap<String, String>) -> String {
    // The longer name first: one may be the beginning of another.
    let mut names: Vec<_> = values.iter().collect();
    names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
    names.into_iter().fold(query.to_owned(), |query, (name, value)| {
        query.replace(&format!("${{{name}}}"), value).replace(&format!("${name}"), value)
    })
}

/// The labels that a legend or a title names: `{{job}}`.
pub fn labels_of(legend: &str) -> Vec<&str> {
    legend.split("{{").skip(1).map(|rest| rest.split_once("}}").expect("it ends").0.trim()).collect()
}
