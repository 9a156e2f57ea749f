//! The dashboards and the alerts ask for what is there: each query of each panel, variable, annotation and alert runs on a
//! real Prometheus, which scrapes a simulated fleet, the real sidecar and a real node_exporter, and returns data. Where nothing
//! is known, no panel shows that all is well.

use crate::support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use regex::Regex;
use reqwest::Url;
use serde_json::{Value, json};
use support::alerts::{rule_files, rules};
use support::binary;
use support::cloud::{Cloud, Reply};
use support::exporter::Exporters;
use support::fleet::{demo_fleet, find, set_release};
use support::grafana::{Dashboard, Shown, dashboards, interpolate, is_colored, labels_of, list, shown, text};
use support::node_exporter;
use support::prometheus::Prometheus;
use support::sidecar::{PATIENCE, Running, Sidecar};

/// Panels that may have nothing to show here, each with its reason.
const MAY_BE_EMPTY: [(&str, &str); 1] = [("IP addresses", "this machine may have loopback only")];

/// Panels with a query that this machine may not answer, but the simulated board does: what the kernel or the hardware has.
const OF_A_BOARD: [(&str, &str); 4] = [
    ("Temperature", "a virtual machine has no sensor"),
    ("Voltage", "only a Raspberry Pi measures it"),
    ("Swap", "there may be none"),
    ("Pressure", "the kernel may be built without it"),
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

/// The device with a real node_exporter behind it, and one that is simulated to the end.
const REAL: &str = "fridge-01";
const BOARD: &str = "gateway-north";

fn uuid_of(devices: &[Value], name: &str) -> Option<String> {
    let device = devices.iter().find(|device| device["device_name"] == name)?;
    Some(text(device, "uuid").to_owned())
}

/// What runs, and ends in this order.
struct Stack {
    prometheus: Prometheus,
    start: SystemTime,
    uuids: BTreeMap<&'static str, String>,
    _programs: [Running; 2],
    baletheus: Option<Running>,
    _sidecar: Sidecar,
    _exporters: Exporters,
    cloud: Arc<Cloud>,
    _backends: [Cloud; 2],
}

/// Offline: five of the eight street lamps. Not scraped: five of the nine in the cold chain. The rest has one trouble each.
fn troubled_fleet() -> Vec<Value> {
    let (mut devices, hour_ago) = (demo_fleet(), SystemTime::now() - Duration::from_secs(3600));
    for device in &mut devices {
        device["last_vpn_event"] = json!(humantime::format_rfc3339_millis(hour_ago).to_string());
    }
    for name in ["lamp-0001", "lamp-0002", "lamp-0003", "lamp-0004", "lamp-0006", "bench <test>\t🚧"] {
        let device = find(&mut devices, name);
        (device["is_connected_to_vpn"], device["api_heartbeat_state"]) = (json!(false), json!("offline"));
    }
    let mut edit = |name: &str, field: &str, value: Value| find(&mut devices, name)[field] = value;
    edit(REAL, "is_undervolted", json!(true));
    // Without an exporter that answers, whose figures would count instead.
    edit("fridge-02", "cpu_temp", json!(88));
    edit("fridge-02", "memory_usage", json!(7700));
    edit("gw-bergen", "storage_usage", json!(115_000));
    edit("gw-bergen", "should_be_running__release", json!([{ "id": 7, "commit": "c7", "raw_version": "5.0.0" }]));
    devices
}

/// Takes all alerts, and has the metrics of a real one that a dashboard asks for.
fn alertmanager() -> Cloud {
    let server = Cloud::start(Vec::new());
    server.intercept(|seen, _| {
        let page = b"alertmanager_notifications_total{integration=\"webhook\",receiver_name=\"webhook\"} 3\n\
            alertmanager_notifications_failed_total{integration=\"webhook\",reason=\"other\",receiver_name=\"webhook\"} 0\n\
            alertmanager_integrations 1\nprocess_resident_memory_bytes 3e7\nprocess_cpu_seconds_total 1\n";
        let page = if seen.target.as_str() == "/metrics" { &page[..] } else { b"" };
        // Without the end of idle connections, which Prometheus would count as alerts that were dropped.
        Some(Reply::status(200, &[("Content-Type", "text/plain; version=0.0.4"), ("Connection", "close")], page))
    });
    server
}

/// The rules, without the time for which a condition has to hold.
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
    // One of the stack itself. Watchdog proves that rules run.
    groups.push(json!({ "name": "of this test", "rules": [
        { "alert": "OfTheStack", "expr": "up{job='prometheus'} == 1", "labels": { "severity": "info", "scope": "stack" } },
    ] }));
    json!({ "groups": groups }).to_string() // which is YAML as well
}

/// The addresses of the programs that Prometheus scrapes, asks or notifies.
struct Addresses {
    sidecar: String,
    /// The tunnel's URL.
    proxy: String,
    alertmanager: String,
    /// The URL for remote write.
    backend: String,
}

/// The jobs that `prometheus.yml` has, asked as often as this.
fn stack_config(scrape: &str, at: &Addresses) -> Value {
    let job = |name: &str, target: &str| json!({ "job_name": name, "static_configs": [{ "targets": [target] }] });
    json!({
        "global": { "scrape_interval": scrape, "scrape_timeout": "1s", "evaluation_interval": "1s" },
        "rule_files": ["rules.yml"],
        "alerting": { "alertmanagers": [{ "static_configs": [{ "targets": [at.alertmanager] }] }] },
        "remote_write": [{ "url": at.backend }],
        "scrape_configs": [
            { "job_name": "balena", "proxy_url": at.proxy, "file_sd_configs": [{ "files": ["balena.json"] }] },
            job("baletheus", &at.sidecar),
            job("baletheus-tunnel", at.proxy.trim_start_matches("http://")),
            job("alertmanager", &at.alertmanager),
            { "job_name": "prometheus", "file_sd_configs": [{ "files": ["own.json"] }] },
        ],
    })
}

/// The configuration for one's own Prometheus in `docs/dashboards.md`, with the addresses of this test.
fn own_config(at: &Addresses) -> Value {
    let document = include_str!("../../docs/dashboards.md");
    let (_, rest) = document.split_once("```yaml\n").expect("a block of YAML");
    let (yaml, _) = rest.split_once("```").expect("its end");
    let mut text = yaml.to_owned();
    for (there, here) in [
        ("http://127.0.0.1:9798", at.proxy.as_str()),
        ("127.0.0.1:9798", at.proxy.trim_start_matches("http://")),
        ("127.0.0.1:9797", &at.sidecar),
        ("127.0.0.1:9093", &at.alertmanager),
        ("alerts/*.yml", "rules.yml"),
        ("scrape_interval: 60s", "{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}"),
        ("static_configs:\n      - targets: ['127.0.0.1:9090']", "file_sd_configs: [{files: [own.json]}]"),
    ] {
        assert!(text.contains(there), "{there} in\n{yaml}");
        text = text.replace(there, here);
    }
    yaml_serde::from_str(&text).unwrap_or_else(|error| panic!("{error}:\n{text}"))
}

impl Stack {
    /// Everything runs, and Prometheus scrapes as often as this.
    fn start(major: u8, devices: Vec<Value>, scrape: &str) -> Self {
        Self::start_with(major, devices, |at| stack_config(scrape, at))
    }

    fn start_with(major: u8, devices: Vec<Value>, config: impl FnOnce(&Addresses) -> Value) -> Self {
        let cloud = Arc::new(Cloud::start(devices));
        let exporters = Exporters::start(&cloud);
        let uuids: BTreeMap<_, _> = [REAL, BOARD, "gw-bergen"]
            .into_iter()
            .filter_map(|name| Some((name, cloud.change(|devices| uuid_of(devices, name))?)))
            .collect();
        let sidecar = Sidecar::of(binary::path(), &cloud)
            .env("EXPORTERS", "node:80")
            .env("LISTEN_ADDRESS", "127.0.0.1:0")
            .env("DEVICE_REFRESH_RATE", "1s")
            .env("DEVICE_METRICS", "true");
        let (node_exporter, address) =
            node_exporter::start(node_exporter::FULL, &sidecar.path("device"), node_exporter::OF_THE_CONTAINER);
        let nobody = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
        if let Some(real) = uuids.get(REAL) {
            exporters.forward(real, address);
        }
        for name in ["fridge-02", "fridge-04", "fridge-05", "freezer-01", "冷蔵庫-07"] {
            if let Some(uuid) = cloud.change(|devices| uuid_of(devices, name)) {
                exporters.forward(&uuid, nobody);
            }
        }

        let running = sidecar.start();
        let line = running.wait_for("status on http://");
        let status = line.rsplit_once("http://").expect("a URL").1.to_owned();
        if !uuids.is_empty() {
            running.wait_for("updated balena.json");
        }
        let (tunnel, proxy) = sidecar.tunnel(&exporters.vpn.url());
        let alertmanager = alertmanager();
        let alerts = alertmanager.url().replace("http://", "");
        let backend = Cloud::start(Vec::new());
        backend.intercept(|_, _| Some(Reply::status(200, &[], b"")));
        fs::write(sidecar.path("rules.yml"), impatient_rules()).expect("written");
        let path = sidecar.path("prometheus.yml");
        let at = Addresses { sidecar: status, proxy, alertmanager: alerts, backend: backend.url() };
        fs::write(&path, config(&at).to_string()).expect("written");
        let (start, prometheus) = (SystemTime::now(), Prometheus::start(major, &path));
        let address = prometheus.url().replace("http://", "");
        fs::write(sidecar.path("own.json"), json!([{ "targets": [address] }]).to_string()).expect("written");
        Self {
            prometheus,
            start,
            uuids,
            _programs: [tunnel, node_exporter],
            baletheus: Some(running),
            _sidecar: sidecar,
            _exporters: exporters,
            cloud,
            _backends: [alertmanager, backend],
        }
    }

    /// One refresh fails, one device comes and goes, and one gets a new release.
    fn live(&self) {
        let cloud = &self.cloud;
        let once = AtomicBool::new(true);
        cloud.intercept(move |_, _| once.swap(false, Ordering::Relaxed).then(|| Reply::status(500, &[], b"")));
        let flapping = &self.uuids["gw-bergen"];
        for hour in 1..=7 {
            let time = UNIX_EPOCH + Duration::from_secs(1_790_000_000 + hour * 3600);
            let event = json!(humantime::format_rfc3339_millis(time).to_string());
            cloud.change(|devices| find(devices, "gw-bergen")["last_vpn_event"] = event);
            let name = "balena_device_last_connectivity_event_timestamp_seconds";
            let seconds = 1_790_000_000 + hour * 3600;
            let seen = format!("{name}{{uuid='{flapping}'}} == {seconds}");
            self.prometheus
                .wait_until(&seen, PATIENCE, |prometheus| (prometheus.query(&seen).len() == 1).then_some(()));
        }
        for name in [REAL, BOARD] {
            cloud.change(|devices| set_release(find(devices, name), "9.9.9"));
            cloud.change(|devices| find(devices, name)["os_version"] = json!("balenaOS 9.9.9"));
        }
    }

    /// The labels of all series that have a number in them, now or since the start.
    fn ask(&self, query: &str, instant: bool) -> Vec<BTreeMap<String, String>> {
        self.ask_values(query, instant).into_iter().map(|(labels, _)| labels).collect()
    }

    /// The same, with the last number of each.
    fn ask_values(&self, query: &str, instant: bool) -> Vec<(BTreeMap<String, String>, String)> {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).expect("a time").as_secs().to_string();
        let path = if instant { "query" } else { "query_range" };
        let mut parameters = vec![("query", query.to_owned())];
        if !instant {
            let (start, end) = (seconds(self.start), seconds(SystemTime::now()));
            parameters.extend([("start", start), ("end", end), ("step", "2".to_owned())]);
        }
        let url = Url::parse_with_params(&format!("http://prometheus/{path}"), &parameters).expect("a URL");
        let answer = self.prometheus.api(&url.as_str()["http://prometheus/".len()..]);
        let number = |sample: &Value| {
            let value = sample[1].as_str()?;
            value.parse::<f64>().is_ok_and(f64::is_finite).then(|| value.to_owned())
        };
        let last =
            |series: &Value| number(&series["value"]).or(list(series, "/values").iter().filter_map(number).next_back());
        let labels = |series: &Value| {
            let labels = series["metric"].as_object().expect("labels").iter();
            labels.map(|(name, value)| (name.clone(), value.as_str().expect("text").to_owned())).collect()
        };
        list(&answer, "/result").iter().filter_map(|series| Some((labels(series), last(series)?))).collect()
    }

    /// What Grafana would offer for a variable.
    fn values_of(&self, variable: &Value, known: &BTreeMap<String, String>) -> Vec<String> {
        if variable["type"] == "datasource" {
            return vec!["of-this-test".to_owned()];
        }
        if ["custom", "textbox"].contains(&text(variable, "type")) {
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
        let own = [("__rate_interval", "20s")];
        let mut all = vec![BTreeMap::from(own.map(|(name, value)| (name.to_owned(), value.to_owned())))];
        for variable in dashboard.variables() {
            let name = text(variable, "name");
            let found = self.values_of(variable, &all[0]);
            let mut chosen = match name {
                _ if variable["type"] == "custom" => found,
                "device" => found.into_iter().filter(|uuid| uuid == device).collect(),
                _ if variable["includeAll"] == true => vec![text(variable, "allValue").to_owned()],
                _ => found.into_iter().take(1).collect(),
            };
            if chosen.is_empty() && device.is_empty() {
                chosen.push(String::new()); // as Grafana does
            }
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

/// What a panel shows that may be taken for peace: in green, or in words.
fn calm(stack: &Stack, panel: &Value, values: &BTreeMap<String, String>) -> Vec<String> {
    let mut found = Vec::new();
    let mut see = |what: &str, shown: Shown| {
        if shown.color.contains("green") {
            found.push(format!("{what} {}", shown.text).trim().to_owned());
        }
    };
    if ["stat", "gauge", "bargauge"].contains(&text(panel, "type")) {
        see("", shown(panel, "", None));
    }
    let targets = list(panel, "/targets");
    for target in targets {
        let series = stack.ask_values(&interpolate(text(target, "expr"), values), target["instant"] == true);
        for (labels, value) in series {
            match text(panel, "type") {
                "table" => {
                    let several = targets.len() > 1;
                    let value_of =
                        if several { format!("Value #{}", text(target, "refId")) } else { "Value".to_owned() };
                    let columns = list(panel, "/transformations").iter().find(|step| step["id"] == "organize");
                    let columns = &columns.expect("organized")["options"]["renameByName"];
                    for (label, value) in labels.iter().chain([(&value_of, &value)]) {
                        let column = text(columns, label);
                        if is_colored(panel, column) {
                            see(column, shown(panel, column, Some(value)));
                        }
                    }
                }
                "timeseries" => {}
                _ => {
                    let name = interpolate_labels(text(target, "legendFormat"), &labels);
                    see(&name, shown(panel, &name, Some(&value)));
                }
            }
        }
    }
    found.sort();
    found.dedup();
    found
}

fn interpolate_labels(legend: &str, labels: &BTreeMap<String, String>) -> String {
    labels.iter().fold(legend.to_owned(), |legend, (name, value)| legend.replace(&format!("{{{{{name}}}}}"), value))
}

/// Every panel of every dashboard that shows peace, with what it shows; the first line of the home dashboard is red.
fn peace(stack: &Stack, device: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for dashboard in dashboards() {
        let choices = stack.choices(&dashboard, device);
        for panel in dashboard.panels() {
            for values in &choices {
                let title = format!("{}: {}", dashboard.file.trim_end_matches(".json"), text(panel, "title"));
                found.extend(calm(stack, panel, values).into_iter().map(|what| format!("{title}: {what}")));
            }
        }
    }
    found
}

/// The tiles of the first line, in their order.
fn first_line(stack: &Stack) -> Vec<(String, Shown)> {
    let dashboards = dashboards();
    let fleet = dashboards.iter().find(|dashboard| dashboard.uid() == "baletheus-fleet").expect("the home dashboard");
    let panel = fleet.panels()[0].clone();
    assert_eq!(panel["gridPos"]["y"], 0, "it comes first");
    let tiles = list(&panel, "/targets").iter().map(|target| {
        let (name, answer) = (text(target, "legendFormat"), stack.ask_values(text(target, "expr"), true));
        assert_eq!(answer.len(), 1, "{name} always has one value");
        (name.to_owned(), shown(&panel, name, Some(&answer[0].1)))
    });
    tiles.collect()
}

/// Waits for it, and fails with the last one that it saw; an empty text is any.
fn wait_for_first_line(stack: &Stack, wanted: [&str; 5]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let line = first_line(stack);
        let texts: Vec<_> = line.iter().map(|(_, shown)| shown.text.as_str()).collect();
        if texts.iter().zip(wanted).all(|(text, wanted)| wanted.is_empty() || *text == wanted) {
            let color = if texts[0] == "yes" { "green" } else { "red" };
            return assert_eq!(line[0].1.color, color, "the color of {:?}", texts[0]);
        }
        assert!(Instant::now() < deadline, "the first line is {texts:?} and not {wanted:?}");
        thread::sleep(Duration::from_millis(500));
    }
}

fn set<const N: usize>(all: [&str; N]) -> BTreeSet<String> {
    all.into_iter().map(str::to_owned).collect()
}

const DEAD: [&str; 5] = ["NO", "no answer", "answered", "evaluated", ""];

/// Prometheus still knows that all is well with what it scrapes, and knows nothing of balenaCloud and of alerts.
fn a_dead_sidecar_shows(major: u8) {
    let mut stack = Stack::start(major, troubled_fleet(), "1s");
    // Prometheus 2 drops what its rules say before it knows of Alertmanager.
    let (all, sent) = if major == 2 { ("", "") } else { ("yes", "delivered") };
    wait_for_first_line(&stack, [all, "current", "answered", "evaluated", sent]);
    stack.baletheus = None; // which kills it
    wait_for_first_line(&stack, DEAD);
    let uuid = stack.uuids[BOARD].clone();
    let shown = peace(&stack, &uuid);
    // Of the exporters, which Prometheus goes on to scrape.
    let exporters = [
        "discovery: Can this be believed?: ",
        "discovery: Services: ",
        "fleet-overview: Can this be believed?: ",
        "fleet-overview: Devices: CPU ",
        "fleet-overview: Devices: Disk ",
        "fleet-overview: Devices: Memory ",
        "fleet-overview: Devices: Temperature ",
        "node-exporter: ",
    ];
    let others: Vec<_> = shown.iter().filter(|shown| !exporters.iter().any(|known| shown.starts_with(known))).collect();
    assert!(others.is_empty(), "{others:#?}");
    assert!(!shown.contains("fleet-overview: Can this be believed?: Believe it? yes"), "{shown:#?}");
    let table =
        dashboards().into_iter().find(|dashboard| dashboard.uid() == "baletheus-fleet").expect("the home dashboard");
    let values = &stack.choices(&table, "")[0];
    let panel =
        table.panels().into_iter().find(|panel| text(panel, "title") == "Devices" && text(panel, "type") == "table");
    let states = stack.ask_values(&interpolate(text(&panel.expect("a table")["targets"][0], "expr"), values), true);
    let states: BTreeSet<_> = states.iter().map(|(_, state)| state.as_str()).collect();
    assert_eq!(states, ["10", "11"].into(), "no state that balenaCloud would have to tell");
}

#[test]
fn a_dead_sidecar_is_no_peace() {
    a_dead_sidecar_shows(3);
}

#[test]
fn a_dead_sidecar_is_no_peace_to_prometheus_2() {
    a_dead_sidecar_shows(2);
}

/// Rules run from the first second on; nothing is scraped for minutes.
#[test]
fn a_prometheus_that_just_started_is_no_peace() {
    for major in [2, 3] {
        let stack = Stack::start(major, troubled_fleet(), "100d");
        wait_for_first_line(&stack, ["NO", "no answer", "no target", "evaluated", "no Alertmanager"]);
        assert_eq!(peace(&stack, ""), set(RULES_RUN), "Prometheus {major}");
    }
}

const RULES_RUN: [&str; 2] =
    ["discovery: Can this be believed?: Rules evaluated", "fleet-overview: Can this be believed?: Rules evaluated"];

#[test]
fn an_empty_fleet_is_no_peace() {
    for major in [2, 3] {
        let stack = Stack::start(major, Vec::new(), "1s");
        wait_for_first_line(&stack, ["NO", "no device", "no target", "evaluated", ""]);
        let up = ["alertmanager", "baletheus", "baletheus-tunnel", "prometheus"];
        let all = "count(up{uuid=''} == 1) == 4";
        stack.prometheus.wait_until(all, PATIENCE, |_| (!stack.ask(all, true).is_empty()).then_some(()));
        let up = up.map(|job| format!("discovery: Services: {job} up"));
        let other = ["discovery: Age of the list: ", "Can this be believed?: Notifications delivered"];
        let other = |shown: &String| other.iter().any(|other| shown.contains(other));
        let shown: BTreeSet<_> = peace(&stack, "").into_iter().filter(|shown| !other(shown)).collect();
        let known: BTreeSet<_> = set(RULES_RUN).into_iter().chain(up).collect();
        assert_eq!(shown, known, "Prometheus {major}");
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

/// As `docs/dashboards.md` says it: the first line is green, and `instance` is what people read.
#[test]
fn ones_own_prometheus_is_enough() {
    for major in [2, 3] {
        let stack = Stack::start_with(major, demo_fleet(), own_config);
        wait_for_first_line(&stack, ["", "current", "answered", "evaluated", ""]);
        let devices = stack.cloud.change(|devices| devices.clone());
        let name = |device: &Value| format!("{} ({:.7})", text(device, "device_name"), text(device, "uuid"));
        let names: BTreeMap<_, _> =
            devices.iter().map(|device| (text(device, "uuid").to_owned(), name(device))).collect();
        let series = stack.prometheus.wait_until("all devices", PATIENCE, |prometheus| {
            let series = prometheus.query("up{uuid!=''}");
            (series.len() > 20).then_some(series)
        });
        for (labels, _) in series {
            assert_eq!(labels["instance"], names[&labels["uuid"]], "Prometheus {major}");
        }
    }
}
