//! Each query of each panel, annotation and alert returns data, with the labels that its panel names.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::stack::{BOARD, FAILING, REAL, Stack, troubled_fleet};
use crate::support;
use support::alerts::rules;
use support::grafana::{Dashboard, dashboards, interpolate, labels_of, list, text};
use support::sidecar::PATIENCE;

/// Panels that may have nothing to show here, each with its reason.
const MAY_BE_EMPTY: [(&str, &str); 3] = [
    ("Blind since", "the monitoring works"),
    ("IP addresses", "this machine may have loopback only"),
    ("Is the newest release worse?", "takes an hour of two releases"),
];

/// Panels with a query that another device answers, each with what the real exporter's device does not have.
const OF_ANOTHER: [(&str, &str); 7] = [
    ("Temperature", "a virtual machine has no sensor"),
    ("Voltage", "only a Raspberry Pi measures it"),
    ("Swap", "there may be none"),
    ("Pressure", "the kernel may be built without it"),
    ("Services that do not run", "all of them run"),
    ("Update", "it is done"),
    ("Why its targets fail", "they answer"),
];

/// Alerts that do not fire here, each with its reason. Scenarios show that they can.
const QUIET: [(&str, &str); 27] = [
    ("ServiceNotRunning", "takes 15 minutes"),
    ("FleetServiceDown", "no service stops in a quarter of a fleet"),
    ("ServicesStale", "all is well with discovery"),
    ("ExporterDown", "all exporters of a simulated device go together"),
    ("SeriesChurn", "no exporter has new series all the time"),
    ("AnswersTooLarge", "no exporter sends that much"),
    ("DeviceVanished", "takes an hour"),
    ("DiskFilling", "takes nine hours"),
    ("StorageErrors", "no simulated device has it"),
    ("StorageSaturated", "no simulated device has it"),
    ("OomKills", "nothing is killed here"),
    ("ClockOff", "one machine has one clock"),
    ("RebootLoop", "nothing boots here"),
    ("UpdateStuck", "takes two hours"),
    ("FleetOffline", "no device was online before"),
    ("FleetNotScraped", "no more of them have answered before"),
    ("ReleaseWorse", "takes an hour of two releases"),
    ("DiscoveryDown", "all is well with discovery"),
    ("DiscoveryStale", "all is well with discovery"),
    ("DiscoveryNotTrusted", "all is well with discovery"),
    ("TargetsDropped", "all is well with discovery"),
    ("NothingScraped", "some devices answer"),
    ("TunnelDown", "the tunnel answers"),
    ("TunnelFailing", "all is well with the tunnel"),
    ("MonitoringDown", "all of it works"),
    ("HistoryShort", "takes days"),
    ("RemoteWriteBehind", "there is no backend"),
];

/// What Grafana asks when it shows a panel, and which labels it needs in the answer.
struct Question {
    /// Dashboard, panel and query.
    name: String,
    panel: String,
    expr: String,
    instant: bool,
    labels: BTreeSet<String>,
    needs_data: bool,
}

fn questions(dashboard: &Dashboard) -> Vec<Question> {
    let mut all = Vec::new();
    for panel in dashboard.panels() {
        let title = text(panel, "title");
        for target in list(panel, "/targets") {
            let legend = labels_of(text(target, "legendFormat"));
            all.push(Question {
                name: format!("{}: {title}, {}", dashboard.file, text(target, "refId")),
                panel: title.to_owned(),
                expr: text(target, "expr").to_owned(),
                instant: target["instant"] == true,
                labels: legend.into_iter().map(str::to_owned).collect(),
                needs_data: !MAY_BE_EMPTY.iter().any(|(panel, _)| *panel == title),
            });
        }
    }
    for annotation in list(&dashboard.json, "/annotations/list").iter().filter(|annotation| annotation["builtIn"] != 1)
    {
        let texts = ["titleFormat", "textFormat"].map(|key| labels_of(text(annotation, key))).concat();
        all.push(Question {
            name: format!("{}: annotation {}", dashboard.file, text(annotation, "name")),
            panel: String::new(),
            // Time goes faster here.
            expr: text(&annotation["target"], "expr").replace("offset 2m", "offset 5s"),
            instant: false,
            labels: texts.into_iter().map(str::to_owned).collect(),
            needs_data: true,
        });
    }
    all
}

/// Why it is not answered, if it is not.
fn unanswered(stack: &Stack, dashboard: &Dashboard, question: &Question) -> Option<String> {
    let mut why = String::new();
    for device in [REAL, BOARD, FAILING] {
        if device != REAL && !OF_ANOTHER.iter().any(|(panel, _)| *panel == question.panel) {
            break;
        }
        let choices = stack.choices(dashboard, &stack.uuids[device]);
        if choices.is_empty() {
            why = format!("a variable has no value for {device}");
            continue;
        }
        let mut missing = Vec::new();
        for values in choices {
            let query = interpolate(&question.expr, &values);
            assert!(!query.replace("$1", "").contains('$'), "{}: {query}", question.name);
            let series = stack.ask(&query, question.instant);
            let labels: BTreeSet<_> = series.iter().flat_map(BTreeMap::keys).cloned().collect();
            let wanted: Vec<_> = question.labels.iter().map(|label| interpolate(label, &values)).collect();
            if series.is_empty() && question.needs_data {
                missing.push(format!("no data: {query}"));
            } else if let Some(label) = wanted.iter().find(|label| !labels.contains(*label) && !series.is_empty()) {
                missing.push(format!("no label {label} in {labels:?}: {query}"));
            }
        }
        if missing.is_empty() {
            return None;
        }
        why = missing.join("\n    ");
    }
    Some(format!("{}: {why}", question.name))
}

#[test]
fn every_query_gives_data() {
    let (stack, dashboards) = (Stack::start(3, troubled_fleet(), "1s"), dashboards());
    stack.live();
    let deadline = Instant::now() + 2 * PATIENCE;
    let mut open: Vec<_> = dashboards
        .iter()
        .flat_map(|dashboard| questions(dashboard).into_iter().map(move |question| (dashboard, question)))
        .collect();
    assert!(open.len() > 100, "{} queries", open.len());
    let mut alerts: Vec<_> = rules().into_iter().filter_map(|rule| Some((rule.alert?, rule.expr))).collect();
    alerts.retain(|(name, _)| !QUIET.iter().any(|(quiet, _)| quiet == name));
    loop {
        let mut why = Vec::new();
        open.retain(|(dashboard, question)| {
            let open = unanswered(&stack, dashboard, question);
            why.extend(open.clone());
            open.is_some()
        });
        alerts.retain(|(name, expr)| {
            let quiet = stack.ask(expr, true).is_empty();
            why.extend(quiet.then(|| format!("alert {name}: no data: {expr}")));
            quiet
        });
        if why.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "{} without an answer:\n{}", why.len(), why.join("\n"));
        thread::sleep(Duration::from_secs(1));
    }
    for (name, _) in QUIET {
        assert!(rules().iter().any(|rule| rule.alert.as_deref() == Some(name)), "no alert {name}");
    }
    columns(&stack, &dashboards);
}

/// Each column that a table hides, moves, renames or formats is in the answers.
fn columns(stack: &Stack, dashboards: &[Dashboard]) {
    for dashboard in dashboards {
        for panel in dashboard.panels().into_iter().filter(|panel| text(panel, "type") == "table") {
            let name = format!("{}: {}", dashboard.file, text(panel, "title"));
            if MAY_BE_EMPTY.iter().any(|(empty, _)| *empty == text(panel, "title")) {
                continue;
            }
            let mut found = BTreeSet::from(["Time".to_owned()]);
            for target in list(panel, "/targets") {
                let several = list(panel, "/targets").len() > 1;
                let value = if several { format!("Value #{}", text(target, "refId")) } else { "Value".to_owned() };
                found.insert(value);
                let devices = [REAL, FAILING].map(|device| stack.choices(dashboard, &stack.uuids[device]));
                for values in devices.concat() {
                    let series = stack.ask(&interpolate(text(target, "expr"), &values), true);
                    found.extend(series.iter().flat_map(BTreeMap::keys).cloned());
                }
            }
            let organize = list(panel, "/transformations").iter().find(|step| step["id"] == "organize");
            let options = &organize.unwrap_or_else(|| panic!("{name} is not organized"))["options"];
            let keys =
                |key: &str| options[key].as_object().expect("an object").keys().cloned().collect::<BTreeSet<_>>();
            let (hidden, ordered, renamed) = (keys("excludeByName"), keys("indexByName"), keys("renameByName"));
            assert_eq!(ordered, renamed, "{name}: columns in order and columns with a title");
            assert_eq!(found, hidden.union(&ordered).cloned().collect(), "{name}: columns found and columns known");
            let titles: BTreeSet<_> =
                options["renameByName"].as_object().expect("titles").values().filter_map(Value::as_str).collect();
            for by in list(panel, "/fieldConfig/overrides").iter().map(|field| &field["matcher"]) {
                let named = text(by, "options").split('|').all(|title| titles.contains(title));
                assert!(named, "{name}: no column {}", by["options"]);
            }
        }
    }
}
