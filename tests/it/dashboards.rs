//! The dashboards and the alerts ask for what is there: each query of each panel, variable, annotation and alert runs on a
//! real Prometheus, which scrapes a simulated fleet, the real sidecar and a real node_exporter, and gives data.

use crate::support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use regex::Regex;
use reqwest::Url;
use serde_json::{Value, json};
use support::alerts::{rule_files, rules};
use support::binary::sidecar;
use support::cloud::{Cloud, Reply};
use support::exporter::Exporters;
use support::fleet::{demo_fleet, find};
use support::grafana::{Dashboard, dashboards, interpolate, labels_of, list, text};
use support::prometheus::Prometheus;
use support::sidecar::{PATIENCE, Running, Sidecar};
use support::tools;

/// Panels that may have nothing to show here, each with its reason.
const MAY_BE_EMPTY: [(&str, &str); 1] =
    [("Collectors that fail", "all collectors of node_exporter may work on this machine")];

/// Panels with a query that this machine may not answer, but the simulated board does: what the kernel or the hardware has.
const OF_A_BOARD: [(&str, &str); 4] = [
    ("Temperature", "a virtual machine has no sensor"),
    ("Voltage", "only a Raspberry Pi measures it"),
    ("Swap", "there may be none"),
    ("Pressure", "the kernel may be built without it"),
];

/// Alerts that do not fire here, each with its reason; that they can, their unit tests show.
const QUIET: [(&str, &str); 14] = [
    ("DeviceOfflineButScraped", "the simulated devices are reached through the VPN only"),
    ("ExporterDown", "all exporters of a simulated device go together"),
    ("DeviceVanished", "takes an hour"),
    ("DiskFilling", "takes six hours"),
    ("DataPartitionReadOnly", "no simulated device has it"),
    ("ClockOff", "one machine has one clock"),
    ("RebootLoop", "nothing boots here"),
    ("DiscoveryDown", "all is well with discovery"),
    ("DiscoveryStale", "all is well with discovery"),
    ("DiscoveryFailing", "one failure is no share"),
    ("TargetsDropped", "all is well with discovery"),
    ("TargetFileUnreadable", "all is well with discovery"),
    ("TunnelDown", "the tunnel answers"),
    ("TunnelFailing", "all is well with the tunnel"),
];

/// The device with a real node_exporter behind it, and one that is simulated to the end.
const REAL: &str = "fridge-01";
const BOARD: &str = "gateway-north";

/// What runs, and ends in this order.
struct Stack {
    prometheus: Prometheus,
    start: SystemTime,
    uuids: BTreeMap<&'static str, String>,
    _programs: [Running; 3],
    _sidecar: Sidecar,
    _exporters: Exporters,
    _cloud: Arc<Cloud>,
}

/// Offline: five of the eight street lamps. Not scraped: five of the nine in the cold chain. The rest has one trouble each.
fn troubled_fleet() -> Vec<Value> {
    let (mut devices, hour_ago) = (demo_fleet(), SystemTime::now() - Duration::from_secs(3600));
    for device in &mut devices {
        device["last_connectivity_event"] = json!(humantime::format_rfc3339_millis(hour_ago).to_string());
    }
    for name in ["lamp-0001", "lamp-0002", "lamp-0003", "lamp-0004", "lamp-0006", "bench <test>\t🚧"] {
        let device = find(&mut devices, name);
        (device["is_online"], device["api_heartbeat_state"]) = (json!(false), json!("offline"));
    }
    let mut edit = |name: &str, field: &str, value: Value| find(&mut devices, name)[field] = value;
    edit(REAL, "is_undervolted", json!(true));
    edit("gw-oslo", "cpu_temp", json!(88));
    edit("gw-oslo", "memory_usage", json!(7700));
    edit("gw-bergen", "storage_usage", json!(115_000));
    edit("gw-bergen", "should_be_running__release", json!([{ "id": 7, "commit": "c7", "raw_version": "5.0.0" }]));
    devices
}

/// With all of its usual collectors.
fn node_exporter() -> (Running, SocketAddr) {
    let mut command = Command::new(tools::node_exporter());
    command.arg("--web.listen-address=127.0.0.1:0");
    let running = Running::spawn(command);
    let line = running.wait_for(r#"msg="Listening on""#);
    let address = line.split_whitespace().find_map(|word| word.strip_prefix("address="));
    (running, address.expect("an address").parse().expect("an address"))
}

/// The rules as they are, but for their patience.
fn impatient_rules() -> String {
    let mut groups = Vec::new();
    for file in rule_files() {
        let mut rules: Value = support::alerts::read(&file);
        for group in rules["groups"].as_array_mut().expect("groups") {
            let group = group.as_object_mut().expect("a group");
            group.remove("interval");
            for rule in group["rules"].as_array_mut().expect("rules") {
                let rule = rule.as_object_mut().expect("a rule");
                rule.remove("for");
                rule.remove("keep_firing_for");
            }
            groups.push(Value::Object(group.clone()));
        }
    }
    json!({ "groups": groups }).to_string() // which is YAML as well
}

impl Stack {
    fn start() -> Self {
        let cloud = Arc::new(Cloud::start(troubled_fleet()));
        let exporters = Exporters::start(&cloud);
        let uuid = |name: &str| cloud.change(|devices| text(find(devices, name), "uuid").to_owned());
        let (node_exporter, address) = node_exporter();
        exporters.forward(&uuid(REAL), address);
        let nobody = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
        for name in ["fridge-02", "fridge-04", "fridge-05", "freezer-01", "冷蔵庫-07"] {
            exporters.forward(&uuid(name), nobody);
        }

        let sidecar = sidecar(&cloud)
            .env("EXPORTERS", "node:80")
            .env("LISTEN_ADDRESS", "127.0.0.1:0")
            .env("DEVICE_REFRESH_RATE", "1s")
            .env("DEVICE_METRICS", "true");
        let running = sidecar.start();
        let line = running.wait_for("status on http://");
        let status = line.rsplit_once("http://").expect("a URL").1;
        running.wait_for("updated balena.json");
        let (tunnel, proxy) = sidecar.tunnel(&exporters.vpn.url());
        fs::write(sidecar.path("rules.yml"), impatient_rules()).expect("written");
        // The jobs that prometheus.yml has, but fast, so that there is soon enough to compute rates of.
        let config = json!({
            "global": { "scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s" },
            "rule_files": ["rules.yml"],
            "scrape_configs": [
                { "job_name": "balena", "proxy_url": proxy, "file_sd_configs": [{ "files": ["balena.json"] }] },
                { "job_name": "baletheus", "static_configs": [{ "targets": [status] }] },
                { "job_name": "baletheus-tunnel", "static_configs": [{ "targets": [proxy.trim_start_matches("http://")] }] },
                { "job_name": "prometheus", "file_sd_configs": [{ "files": ["own.json"] }] },
            ],
        });
        let path = sidecar.path("prometheus.yml");
        fs::write(&path, config.to_string()).expect("written");
        let (start, prometheus) = (SystemTime::now(), Prometheus::start(3, &path));
        let address = prometheus.url().replace("http://", "");
        fs::write(sidecar.path("own.json"), json!([{ "targets": [address] }]).to_string()).expect("written");

        // One refresh fails, and one device comes and goes.
        let once = AtomicBool::new(true);
        cloud.intercept(move |_, _| once.swap(false, Ordering::Relaxed).then(|| Reply::status(500, &[], b"")));
        let flapping = uuid("gw-bergen");
        for hour in 1..=7 {
            let time = UNIX_EPOCH + Duration::from_secs(1_790_000_000 + hour * 3600);
            let event = json!(humantime::format_rfc3339_millis(time).to_string());
            cloud.change(|devices| find(devices, "gw-bergen")["last_connectivity_event"] = event);
            let name = "balena_device_last_connectivity_event_timestamp_seconds";
            let seconds = 1_790_000_000 + hour * 3600;
            let seen = format!("{name}{{uuid='{flapping}'}} == {seconds}");
            prometheus.wait_until(&seen, PATIENCE, |prometheus| (prometheus.query(&seen).len() == 1).then_some(()));
        }
        let uuids = [REAL, BOARD].map(|name| (name, uuid(name))).into();
        Self {
            prometheus,
            start,
            uuids,
            _programs: [running, tunnel, node_exporter],
            _sidecar: sidecar,
            _exporters: exporters,
            _cloud: cloud,
        }
    }

    /// The labels of all series that have a number in them, now or since the start.
    fn ask(&self, query: &str, instant: bool) -> Vec<BTreeMap<String, String>> {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).expect("a time").as_secs().to_string();
        let path = if instant { "query" } else { "query_range" };
        let mut parameters = vec![("query", query.to_owned())];
        if !instant {
            let (start, end) = (seconds(self.start), seconds(SystemTime::now()));
            parameters.extend([("start", start), ("end", end), ("step", "2".to_owned())]);
        }
        let url = Url::parse_with_params(&format!("http://prometheus/{path}"), &parameters).expect("a URL");
        let answer = self.prometheus.api(&url.as_str()["http://prometheus/".len()..]);
        let is_number = |sample: &Value| text(&json!({ "v": sample[1] }), "v").parse::<f64>().is_ok_and(f64::is_finite);
        let with_data = |series: &&Value| is_number(&series["value"]) || list(series, "/values").iter().any(is_number);
        let labels = |series: &Value| {
            let labels = series["metric"].as_object().expect("labels").iter();
            labels.map(|(name, value)| (name.clone(), value.as_str().expect("text").to_owned())).collect()
        };
        list(&answer, "/result").iter().filter(with_data).map(labels).collect()
    }

    /// What Grafana would offer for a variable.
    fn values_of(&self, variable: &Value, known: &BTreeMap<String, String>) -> Vec<String> {
        if variable["type"] == "custom" {
            return list(variable, "/options").iter().map(|option| text(option, "value").to_owned()).collect();
        }
        let query = interpolate(text(&variable["query"], "query"), known);
        if let Some(query) = query.strip_prefix("query_result(").and_then(|query| query.strip_suffix(')')) {
            let regex = text(variable, "regex").strip_prefix('/').and_then(|regex| regex.strip_suffix('/'));
            let regex = Regex::new(regex.expect("/…/")).expect("a regular expression");
            let lines = self.ask(query, true).into_iter().map(|labels| {
                let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
                format!("{{{}}} 1 1", labels.join(","))
            });
            return lines.filter_map(|line| Some(regex.captures(&line)?["value"].to_owned())).collect();
        }
        let inner = query.strip_prefix("label_values(").and_then(|query| query.strip_suffix(')'));
        let (selector, label) = inner.and_then(|inner| inner.rsplit_once(',')).expect("label_values(selector, label)");
        let path = format!("http://prometheus/label/{}/values", label.trim());
        let url = Url::parse_with_params(&path, [("match[]", selector)]).expect("a URL");
        let answer = self.prometheus.api(&url.as_str()["http://prometheus/".len()..]);
        list(&json!({ "all": answer }), "/all").iter().map(|value| value.as_str().expect("text").to_owned()).collect()
    }

    /// Values for all variables, with one device where one is chosen. What a custom variable offers is tried one by one.
    fn choices(&self, dashboard: &Dashboard, device: &str) -> Vec<BTreeMap<String, String>> {
        let own = [("__rate_interval", "20s"), ("__interval", "5s"), ("__range", "60s")];
        let mut all = vec![BTreeMap::from(own.map(|(name, value)| (name.to_owned(), value.to_owned())))];
        for variable in dashboard.variables() {
            let name = text(variable, "name");
            let found = self.values_of(variable, &all[0]);
            let mut chosen = match name {
                _ if variable["type"] == "custom" => found,
                "device" => found.into_iter().filter(|uuid| uuid == device).collect(),
                _ if variable["includeAll"] == true && !found.is_empty() => vec![text(variable, "allValue").to_owned()],
                _ => found.into_iter().take(1).collect(),
            };
            if chosen.is_empty() {
                return Vec::new();
            }
            let rest = chosen.split_off(1);
            let more: Vec<_> = rest.into_iter().map(|value| with(&all[0], name, value)).collect();
            all = all.into_iter().map(|values| with(&values, name, chosen[0].clone())).chain(more).collect();
        }
        all
    }
}

fn with(values: &BTreeMap<String, String>, name: &str, value: String) -> BTreeMap<String, String> {
    values.clone().into_iter().chain([(name.to_owned(), value)]).collect()
}

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
            expr: text(&annotation["target"], "expr").to_owned(),
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
    for device in [REAL, BOARD] {
        if device == BOARD && !OF_A_BOARD.iter().any(|(panel, _)| *panel == question.panel) {
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
            assert!(!query.contains('$'), "{}: {query}", question.name);
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
    let (stack, dashboards) = (Stack::start(), dashboards());
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
                for values in stack.choices(dashboard, &stack.uuids[REAL]) {
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

#[test]
fn each_panel_is_whole_and_in_its_place() {
    let types = ["timeseries", "stat", "gauge", "bargauge", "table", "state-timeline", "text"];
    let source = json!({ "type": "prometheus", "uid": "prometheus" });
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
            for key in ["unit", "noValue"] {
                assert!(!text(&panel["fieldConfig"]["defaults"], key).is_empty(), "{name}: no {key}");
            }
        }
        in_their_places(file, list(json, "/panels"));
        for url in dashboard.links() {
            leads_somewhere(file, url, &dashboards);
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

/// A link to a dashboard names one that is there, and variables of it.
fn leads_somewhere(file: &str, url: &str, dashboards: &[Dashboard]) {
    let Some(path) = url.strip_prefix("/d/") else {
        return assert!(url.starts_with("https://"), "{file}: {url}");
    };
    let (uid, query) = path.split_once('?').expect("variables");
    let found = dashboards.iter().find(|dashboard| dashboard.uid() == uid);
    let found = found.unwrap_or_else(|| panic!("{file}: {url} leads to no dashboard"));
    for parameter in query.split('&').filter_map(|pair| pair.strip_prefix("var-")) {
        let name = parameter.split_once('=').expect("a value").0;
        assert!(found.variables().iter().any(|variable| variable["name"] == name), "{file}: {url}: no variable {name}");
    }
}
