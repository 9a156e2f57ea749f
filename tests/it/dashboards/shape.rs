//! Each panel is whole and in its place, and its queries ask as they should.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;
use serde_json::{Value, json};

use crate::support;
use support::alerts::rules;
use support::grafana::{Dashboard, dashboards, list, text};

#[test]
fn each_panel_is_whole_and_in_its_place() {
    let types = ["timeseries", "stat", "gauge", "bargauge", "table", "state-timeline", "text"];
    let source = json!({ "type": "prometheus", "uid": "${datasource}" });
    let dashboards = dashboards();
    let uids: BTreeSet<_> = dashboards.iter().map(Dashboard::uid).collect();
    let names = ["baletheus-device", "baletheus-discovery", "baletheus-fleet", "baletheus-node"];
    assert_eq!(uids, names.into(), "the uids of the dashboards");
    for dashboard in &dashboards {
        let Dashboard { file, json } = dashboard;
        assert!(json["schemaVersion"].as_u64() >= Some(41), "{file}: schemaVersion");
        for key in ["__inputs", "__requires", "id", "iteration"] {
            assert!(json.get(key).is_none(), "{file} was exported with {key}");
        }
        let first = &dashboard.variables()[0];
        assert_eq!((text(first, "name"), text(first, "type")), ("datasource", "datasource"), "{file}: first variable");
        for annotation in list(json, "/annotations/list").iter().filter(|annotation| annotation["builtIn"] != 1) {
            assert_eq!(annotation["datasource"], source, "{file}: annotation {}", annotation["name"]);
        }
        for variable in dashboard.variables().iter().filter(|variable| variable["type"] == "query") {
            assert_eq!(variable["datasource"], source, "{file}: variable {}", variable["name"]);
        }
        let mut seen = BTreeSet::new();
        for panel in dashboard.panels() {
            let name = format!("{file}: {}", text(panel, "title"));
            assert!(seen.insert(panel["id"].as_u64().expect("an id")), "{name}: its id is taken");
            assert!(types.contains(&text(panel, "type")), "{name}: type {}", panel["type"]);
            assert!(text(panel, "description").ends_with('.'), "{name}: its description is no sentence");
            assert_eq!(panel["datasource"], source, "{name}");
            for target in list(panel, "/targets") {
                assert_eq!(target["datasource"], source, "{name}");
            }
            let defaults = &panel["fieldConfig"]["defaults"];
            assert!(!text(defaults, "unit").is_empty(), "{name}: no unit");
            assert!(text(defaults, "noValue").starts_with("No data"), "{name}: without data, it says something else");
            let base = text(&defaults["thresholds"]["steps"][0], "color");
            assert!(
                ["red", "text"].contains(&base) || text(panel, "type") == "bargauge",
                "{name}: {base} without data"
            );
        }
        in_their_places(file, list(json, "/panels"));
        let own: Vec<_> = list(json, "/links").iter().map(|link| text(link, "url")).collect();
        for link in list(json, "/links").iter().filter(|link| !text(link, "url").starts_with("https://")) {
            assert_eq!(link["keepTime"], true, "{file}: {link}");
            let variables = link["includeVars"] == true || text(link, "url").contains("&var-device=");
            assert!(variables, "{file}: {link} loses the variables");
        }
        for url in dashboard.links() {
            leads_somewhere(file, url, &dashboards);
            let kept = !url.starts_with("/d/") || own.contains(&url) || url.ends_with("&${__url_time_range}");
            assert!(kept, "{file}: {url} loses the time range");
        }
    }
}

/// 24 columns; none lies over another, and each begins where one above it or beside it ends.
fn in_their_places(file: &str, panels: &[Value]) {
    let place = |panel: &Value| ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().expect("a place"));
    let mut taken: BTreeMap<(u64, u64), &str> = BTreeMap::new();
    for panel in panels {
        let ([x, y, w, h], title) = (place(panel), text(panel, "title"));
        assert!(x + w <= 24 && w > 0 && h > 0, "{file}: {title} is not within 24 columns");
        for (column, row) in (x..x + w).flat_map(|column| (y..y + h).map(move |row| (column, row))) {
            let other = taken.insert((column, row), title);
            assert!(other.is_none(), "{file}: {title} lies over {other:?}");
        }
        let closed = list(panel, "/panels");
        assert!(closed.is_empty() || panel["collapsed"] == true, "{file}: {title} is open and has panels inside");
    }
    let bottom = taken.keys().map(|(_, row)| row + 1).max().unwrap_or_default();
    for row in 0..bottom {
        let gaps: Vec<_> = (0..24).filter(|column| !taken.contains_key(&(*column, row))).collect();
        assert!(gaps.is_empty(), "{file}: nothing in row {row}, columns {gaps:?}");
    }
}

/// A link to a dashboard names one that exists, and its variables.
fn leads_somewhere(file: &str, url: &str, dashboards: &[Dashboard]) {
    let Some(path) = url.strip_prefix("/d/") else {
        return assert!(url.starts_with("https://"), "{file}: {url}");
    };
    let (uid, query) = path.split_once('?').expect("variables");
    assert!(query.starts_with("var-datasource=${datasource}&"), "{file}: {url} leads to another data source");
    let found = dashboards.iter().find(|dashboard| dashboard.uid() == uid);
    let found = found.unwrap_or_else(|| panic!("{file}: {url} leads to no dashboard"));
    for parameter in query.split('&').filter_map(|pair| pair.strip_prefix("var-")) {
        let name = parameter.split_once('=').expect("a value").0;
        assert!(found.variables().iter().any(|variable| variable["name"] == name), "{file}: {url}: no variable {name}");
    }
}

/// Metrics of exporters on devices.
fn of_devices(name: &str) -> bool {
    name.starts_with("node_")
}

/// The rules of Grafana's dashboard linter that matter here, and some for these dashboards.
#[test]
fn queries_ask_as_they_should() {
    let selector = Regex::new(r"(?-u:\b)([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}").expect("a regular expression");
    let range = Regex::new(r"(?-u:\b)(i?rate)\([^\[\]]*\[([^\]]*)\]").expect("a regular expression");
    let reports = r"balena_device_(online|update|heartbeat|service|undervolted|cpu|memory|storage)|device:online\{|versions:(newest|devices_online)";
    let reports = Regex::new(reports).expect("a regular expression");
    let alerts: Vec<_> = rules().into_iter().filter_map(|rule| rule.alert).collect();
    let mut selectors = 0;
    for dashboard in dashboards() {
        for (panel, target) in dashboard
            .panels()
            .iter()
            .flat_map(|panel| list(panel, "/targets").iter().map(move |target| (panel, target)))
        {
            let (expr, name) = (text(target, "expr"), format!("{}: {}", dashboard.file, text(panel, "title")));
            for window in range.captures_iter(expr) {
                assert_eq!(&window[2], "$__rate_interval", "{name}: {expr}");
            }
            if range.is_match(expr) && selector.captures_iter(expr).any(|found| of_devices(&found[1])) {
                // A window of 6 minutes at least, so that an exporter that is asked every 2 minutes has 3 samples in it.
                assert_eq!(text(target, "interval"), "90s", "{name}: shortest step");
            }
            for found in selector.captures_iter(expr) {
                selectors += 1;
                let (metric, matchers) = (&found[1], &found[2]);
                // Of devices, only the sidecar says what balenaCloud knows.
                let trusted = !metric.starts_with("balena_device_") || matchers.contains("job=\"baletheus\"");
                assert!(trusted, "{name}: {metric}{{{matchers}}} may come from a device");
                let needed: &[&str] = match (dashboard.uid(), metric) {
                    (_, "ALERTS" | "ALERTS_FOR_STATE") => &["severity"],
                    (_, metric) if metric.starts_with("discovery:") => &["job=\"\""],
                    ("baletheus-discovery", metric) if metric.starts_with("baletheus_") => &["job|instance"],
                    ("baletheus-device" | "baletheus-node", "up") if matchers.contains("job=") => &[],
                    ("baletheus-device", _) => &["uuid=\"$device\", uuid!=\"\""],
                    ("baletheus-node", _) => &["uuid=\"$device\", uuid!=\"\"", "job=~\"$job\""],
                    ("baletheus-fleet", metric) if of_devices(metric) => &["uuid!=\"\""],
                    _ => &[],
                };
                for needed in needed {
                    let there = needed.split('|').any(|one| matchers.contains(one));
                    assert!(there, "{name}: {metric}{{{matchers}}} without {needed}");
                }
            }
            // What balenaCloud reports is not shown as if it were so now while nobody knows.
            let reported = reports.is_match(expr);
            let guarded =
                ["discovery:works", "device:blind", "device:online:known"].iter().any(|guard| expr.contains(guard));
            assert!(!reported || guarded, "{name}: {expr} shows a report that may be old");
            // They change; what counts is the labels severity and scope.
            let named = alerts.iter().find(|alert| expr.contains(&format!("{alert}\"")));
            assert!(named.is_none(), "{name} asks for the alert {named:?}");
            assert!(!expr.contains("count(count by"), "{name}: count() alone will do");
        }
    }
    assert!(selectors > 200, "{selectors} selectors");
}

/// The lines in the graphs of a device are where alerts fire.
#[test]
fn lines_are_the_thresholds_of_alerts() {
    let limits: Vec<f64> = {
        let compared = Regex::new(r"(?:>=?|<=?)\s*(-?[0-9.]+)").expect("a regular expression");
        let rules: Vec<_> = rules().into_iter().filter(|rule| rule.alert.is_some()).map(|rule| rule.expr).collect();
        rules.iter().flat_map(|expr| compared.captures_iter(expr).filter_map(|found| found[1].parse().ok())).collect()
    };
    let mut lines = BTreeMap::new();
    for dashboard in dashboards() {
        for panel in dashboard.panels() {
            let defaults = &panel["fieldConfig"]["defaults"];
            if defaults["custom"]["thresholdsStyle"]["mode"] == "dashed" {
                let line = defaults["thresholds"]["steps"][1]["value"].as_f64().expect("a line");
                assert!(limits.contains(&line), "{}: {line} is no threshold of an alert", text(panel, "title"));
                lines.insert(text(panel, "title").to_owned(), line);
            }
        }
    }
    let titles: Vec<_> = lines.keys().map(String::as_str).collect();
    assert_eq!(titles, ["Disk", "Memory", "Temperature"]);
}
