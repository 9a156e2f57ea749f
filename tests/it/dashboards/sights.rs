//! What a panel shows: its texts and colours, as Grafana makes them of Prometheus' answers.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::stack::Stack;
use crate::support;
use support::grafana::{Dashboard, Shown, dashboards, interpolate, is_colored, list, shown, text};
use support::sidecar::PATIENCE;

/// What one panel shows now: the series or column of each value, and what Grafana makes of it.
pub type Sight = Vec<(String, Shown)>;

/// A table is a list of rows, and each column has its title.
fn sight(stack: &Stack, panel: &Value, values: &BTreeMap<String, String>) -> Sight {
    let (mut found, kind, targets) = (Vec::new(), text(panel, "type"), list(panel, "/targets"));
    for target in targets {
        for (labels, value) in stack.ask_values(&interpolate(text(target, "expr"), values), true) {
            if kind != "table" {
                let name = interpolate_labels(&interpolate(text(target, "legendFormat"), values), &labels);
                let mut shown = shown(panel, &name, Some(&value));
                if kind == "timeseries" {
                    shown.color.clear(); // that of a line tells nothing
                }
                found.push((name, shown));
                continue;
            }
            let column =
                if targets.len() > 1 { format!("Value #{}", text(target, "refId")) } else { "Value".to_owned() };
            let organize = list(panel, "/transformations").iter().find(|step| step["id"] == "organize");
            let titles = &organize.expect("organized")["options"]["renameByName"];
            for (label, value) in
                labels.iter().chain([(&column, &value)]).filter(|(label, _)| titles[label].is_string())
            {
                let title = text(titles, label);
                let mut shown = shown(panel, title, Some(value));
                if !is_colored(panel, title) {
                    shown.color.clear();
                }
                found.push((title.to_owned(), shown));
            }
        }
    }
    found
}

fn interpolate_labels(legend: &str, labels: &BTreeMap<String, String>) -> String {
    labels.iter().fold(legend.to_owned(), |legend, (name, value)| legend.replace(&format!("{{{{{name}}}}}"), value))
}

/// All panels of all dashboards, by `dashboard: type title`. The variables offer this device.
pub fn sights(stack: &Stack, device: &str) -> BTreeMap<String, Sight> {
    let mut all = BTreeMap::<String, Sight>::new();
    for dashboard in dashboards() {
        let choices = stack.prometheus.wait_until("variables that offer the device", PATIENCE, |_| {
            let choices = stack.choices(&dashboard, device);
            (!choices.is_empty()).then_some(choices)
        });
        for panel in dashboard.panels() {
            let file = dashboard.file.trim_end_matches(".json");
            let name = format!("{file}: {} {}", text(panel, "type"), text(panel, "title"));
            let before = all.insert(name.clone(), sight(stack, panel, &choices[0]));
            assert!(before.is_none(), "two panels are {name}");
        }
    }
    all
}

pub fn home() -> Dashboard {
    dashboards().into_iter().find(|dashboard| dashboard.uid() == "baletheus-fleet").expect("the home dashboard")
}

/// Waits for the tiles of the first line and the causes beside them, and fails with what it saw last. An empty text is any.
pub fn wait_for_first_line(stack: &Stack, tiles: [&str; 5], causes: &[&str]) {
    let (home, deadline) = (home(), Instant::now() + PATIENCE);
    let panels = home.panels();
    let [first, second] = [0, 1].map(|place| {
        assert_eq!(panels[place]["gridPos"]["y"], 0, "it comes first");
        panels[place]
    });
    let any = |found: &str, wanted: &str| wanted.is_empty() || found == wanted;
    loop {
        let (line, beside) = (sight(stack, first, &BTreeMap::new()), sight(stack, second, &BTreeMap::new()));
        assert_eq!(line.len(), tiles.len(), "each tile always has one value: {line:?}");
        let found: BTreeSet<_> = beside.iter().map(|(cause, _)| cause.as_str()).collect();
        if line.iter().zip(tiles).all(|((_, shown), wanted)| any(&shown.text, wanted))
            && found == causes.iter().copied().collect()
        {
            let color = if line[0].1.text == "working" { "green" } else { "red" };
            return assert_eq!(line[0].1.color, color, "the color of {line:?}");
        }
        assert!(Instant::now() < deadline, "{line:#?}\n{found:?}\nand not {tiles:?}\n{causes:?}");
        thread::sleep(Duration::from_millis(500));
    }
}
