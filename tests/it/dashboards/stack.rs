//! What runs behind the dashboards: a simulated cloud and its devices, the real sidecar, tunnel and Prometheus.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use regex::{Captures, Regex};
use serde_json::{Value, json};

use crate::support;
use support::alerts::rule_files;
use support::binary;
use support::cloud::{Cloud, Reply};
use support::exporter::Exporters;
use support::fleet::{demo_fleet, find, install, running_release, set_release, set_target};
use support::grafana::text;
use support::node_exporter;
use support::prometheus::Prometheus;
use support::sidecar::{PATIENCE, Running, Sidecar};

/// The device with a real node_exporter behind it, and one that is simulated to the end.
pub const REAL: &str = "fridge-01";
pub const BOARD: &str = "gateway-north";
/// One that does not answer, with a service that ended and an update that is not done.
pub const FAILING: &str = "fridge-02";

fn uuid_of(devices: &[Value], name: &str) -> Option<String> {
    let device = devices.iter().find(|device| device["device_name"] == name)?;
    Some(text(device, "uuid").to_owned())
}

/// What runs, and ends in this order.
pub struct Stack {
    pub prometheus: Prometheus,
    pub start: SystemTime,
    pub uuids: BTreeMap<&'static str, String>,
    pub baletheus: Option<Running>,
    pub tunnel: Option<Running>,
    _node_exporter: Running,
    _sidecar: Sidecar,
    _exporters: Exporters,
    pub cloud: Arc<Cloud>,
    _backends: [Cloud; 2],
}

/// Offline: five of the eight street lamps. Not scraped: five of the nine in the cold chain. The rest has one trouble each.
pub fn troubled_fleet() -> Vec<Value> {
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
    edit(FAILING, "cpu_temp", json!(88));
    edit(FAILING, "memory_usage", json!(7700));
    edit("gw-bergen", "storage_usage", json!(115_000));
    edit("gw-bergen", "should_be_running__release", json!([{ "id": 7, "commit": "c7", "raw_version": "5.0.0" }]));
    let failing = find(&mut devices, FAILING);
    install(failing, running_release(failing), 2, "app", "exited", None);
    set_target(failing, "1.10.0");
    failing["update_status"] = json!("downloading");
    failing["last_update_status_event"] = failing["last_vpn_event"].clone();
    let target = failing["should_be_running__release"][0]["id"].as_u64().expect("a release");
    install(failing, target, 2, "app", "Downloading", Some(42));
    let weeks_ago = SystemTime::now() - Duration::from_secs(20 * 86_400);
    find(&mut devices, "lamp-0006")["last_vpn_event"] = json!(humantime::format_rfc3339_millis(weeks_ago).to_string());
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

/// Time runs thirty times as fast here: a window of an hour is one of two minutes, what is old after ten minutes is old after
/// twenty seconds, and what is scraped each minute is scraped every two seconds.
fn fast(expr: &str) -> String {
    let window = Regex::new(r"(\[|:|offset )([0-9]+)([mhd])").expect("a regular expression");
    let expr = window.replace_all(expr, |found: &Captures| {
        let number: u64 = found[2].parse().expect("a number");
        match &found[3] {
            "m" => format!("{}{}s", &found[1], number * 2),
            "h" => format!("{}{}m", &found[1], number * 2),
            _ => format!("{}{}m", &found[1], number * 48),
        }
    });
    let age = Regex::new(r"([<>]) ([69])00(?-u:\b)").expect("a regular expression");
    age.replace_all(&expr, |found: &Captures| format!("{} {}", &found[1], if &found[2] == "6" { 20 } else { 30 }))
        .into_owned()
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
                let expr = fast(rule["expr"].as_str().expect("an expression"));
                rule.insert("expr".to_owned(), json!(expr));
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
pub struct Addresses {
    pub sidecar: String,
    /// The tunnel's URL.
    pub proxy: String,
    pub alertmanager: String,
    /// The URL for remote write.
    pub backend: String,
}

/// The jobs that `prometheus.yml` has, asked as often as this.
fn stack_config(scrape: &str, at: &Addresses) -> Value {
    let job = |name: &str, target: &str| json!({ "job_name": name, "static_configs": [{ "targets": [target] }] });
    json!({
        "global": { "scrape_interval": scrape, "scrape_timeout": scrape, "evaluation_interval": "1s" },
        "rule_files": ["rules.yml"],
        "alerting": { "alertmanagers": [{ "static_configs": [{ "targets": [at.alertmanager] }] }] },
        "remote_write": [{ "url": at.backend }],
        "scrape_configs": [
            { "job_name": "balena", "proxy_url": at.proxy, "file_sd_configs": [{ "files": ["balena.json"] }],
              // The devices ask for another interval.
              "relabel_configs": [
                { "target_label": "__scrape_interval__", "replacement": scrape },
                { "target_label": "__scrape_timeout__", "replacement": scrape },
              ] },
            job("baletheus", &at.sidecar),
            job("baletheus-tunnel", at.proxy.trim_start_matches("http://")),
            job("alertmanager", &at.alertmanager),
            { "job_name": "prometheus", "file_sd_configs": [{ "files": ["own.json"] }] },
        ],
    })
}

/// The same sidecar under two names, as if there were two.
pub fn two_sidecars(at: &Addresses) -> Value {
    let mut config = stack_config("2s", at);
    let jobs = config["scrape_configs"].as_array_mut().expect("jobs");
    let sidecar = jobs.iter_mut().find(|job| job["job_name"] == "baletheus").expect("the sidecar's");
    sidecar["static_configs"][0]["targets"] = json!([at.sidecar, at.sidecar.replace("127.0.0.1", "localhost")]);
    config
}

/// The configuration for one's own Prometheus in `docs/dashboards.md`, with the addresses of this test.
pub fn own_config(at: &Addresses) -> Value {
    let document = include_str!("../../../docs/dashboards.md");
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
    pub fn start(major: u8, devices: Vec<Value>, scrape: &str) -> Self {
        Self::start_with(major, devices, |at| stack_config(scrape, at))
    }

    pub fn start_with(major: u8, devices: Vec<Value>, config: impl FnOnce(&Addresses) -> Value) -> Self {
        let cloud = Arc::new(Cloud::start(devices));
        let exporters = Exporters::start(&cloud);
        let uuids: BTreeMap<_, _> = [REAL, BOARD, FAILING, "gw-bergen"]
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
        for name in [FAILING, "fridge-04", "fridge-05", "freezer-01", "冷蔵庫-07"] {
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
            baletheus: Some(running),
            tunnel: Some(tunnel),
            _node_exporter: node_exporter,
            _sidecar: sidecar,
            _exporters: exporters,
            cloud,
            _backends: [alertmanager, backend],
        }
    }

    /// One refresh fails, one device comes and goes, and one gets a new release.
    pub fn live(&self) {
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
}
