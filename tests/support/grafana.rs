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

    /// All panels, also those within rows; rows themselves are none.
    pub fn panels(&self) -> Vec<&Value> {
        let top = list(&self.json, "/panels").iter();
        let inside = |panel| [panel].into_iter().chain(list(panel, "/panels"));
        top.flat_map(inside).filter(|panel| text(panel, "type") != "row").collect()
    }

    /// All links, in any place, each a URL or a part of one.
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

/// A query with these values for its variables, Grafana's own among them. `$1` belongs to `label_replace` and stays.
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

/// What Grafana makes of a value: a text and the name of a colour.
#[derive(Debug, PartialEq)]
pub struct Shown {
    pub text: String,
    pub color: String,
}

/// The value of a field (a series or a column) of a panel, by its mappings, else by its thresholds; `None` is no value.
pub fn shown(panel: &Value, field: &str, value: Option<&str>) -> Shown {
    let defaults = &panel["fieldConfig"]["defaults"];
    let property = |id: &str| {
        let overrides = list(panel, "/fieldConfig/overrides").iter().filter(|rule| matches(&rule["matcher"], field));
        let mut found = overrides.flat_map(|rule| list(rule, "/properties")).filter(|property| property["id"] == id);
        found.next_back().map_or(&defaults[id], |property| &property["value"])
    };
    let mapped = value.and_then(|value| {
        let results = property("mappings").as_array()?.iter().filter(|mapping| mapping["type"] == "value");
        results.map(|mapping| &mapping["options"][value]).find(|result| !result.is_null())
    });
    if let Some(result) = mapped {
        return Shown { text: text(result, "text").to_owned(), color: text(result, "color").to_owned() };
    }
    let number = value.and_then(|value| value.parse().ok()).unwrap_or(f64::NEG_INFINITY);
    let thresholds = list(property("thresholds"), "/steps").iter();
    let mut reached = thresholds.filter(|step| step["value"].as_f64().unwrap_or(f64::NEG_INFINITY) <= number);
    let color = reached.next_back().map_or("", |step| text(step, "color"));
    let empty = text(defaults, "noValue");
    Shown { text: value.unwrap_or(empty).to_owned(), color: color.to_owned() }
}

fn matches(matcher: &Value, field: &str) -> bool {
    let options = text(matcher, "options");
    match text(matcher, "id") {
        "byName" => options == field,
        // Grafana takes a text without slashes as the whole of the name.
        "byRegexp" => options.split('|').any(|name| name == field),
        other => panic!("matcher {other}"),
    }
}

/// Whether a column of a table has the colour of its value.
pub fn is_colored(panel: &Value, field: &str) -> bool {
    let overrides = list(panel, "/fieldConfig/overrides").iter().filter(|rule| matches(&rule["matcher"], field));
    overrides.flat_map(|rule| list(rule, "/properties")).any(|property| property["id"] == "custom.cellOptions")
}
