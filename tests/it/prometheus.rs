//! End to end: a simulated balenaCloud, the sidecar, and what the real Prometheus makes of its file with the project's
//! `prometheus.yml`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;
use std::sync::Arc;

use crate::support::binary::sidecar;
use crate::support::cloud::{Cloud, Reply, Service};
use crate::support::exporter::Exporters;
use crate::support::fleet::{demo_fleet, find, gateway, running_release, set_release, set_tag, sibling};
use crate::support::prometheus::{NodeExporter, Prometheus, project_config, promtool_check_config};
use crate::support::sidecar::{PATIENCE, Running, Sidecar};
use crate::support::tls::Authority;
use rustls::{ServerConnection, StreamOwned};
use serde_json::{Value, json};

/// The sidecar has written its file, Prometheus reads it, and goes through the tunnel. They end in this order.
struct Chain {
    prometheus: Prometheus,
    tunnel: Running,
    _running: Running,
    _sidecar: Sidecar,
}

impl Chain {
    fn start(major: u8, sidecar: Sidecar, exporters: &Exporters) -> Self {
        Self::start_with(major, sidecar, exporters, "")
    }

    /// With more settings for the job whose targets are in the VPN.
    fn start_with(major: u8, sidecar: Sidecar, exporters: &Exporters, settings: &str) -> Self {
        // Tags of devices stand for what a fleet may declare.
        let sidecar = sidecar.env("OWN_TAGS", "all");
        let running = sidecar.start();
        running.wait_for("updated balena.json");
        let config = sidecar.path("prometheus.yml");
        let (tunnel, url) = sidecar.tunnel(&exporters.vpn.url());
        let proxy = format!("    proxy_url: {url}\n");
        fs::write(&config, project_config(&url).replace(&proxy, &(proxy.clone() + settings))).expect("written");
        promtool_check_config(major, &config).expect("promtool accepts it");
        Self { prometheus: Prometheus::start(major, &config), tunnel, _running: running, _sidecar: sidecar }
    }

    /// Waits until a target of the device is as it should be.
    fn wait_for_target(&self, what: &str, device_name: &str, fits: impl Fn(&Value) -> bool) -> Value {
        self.prometheus.wait_until(what, PATIENCE, |prometheus| {
            let targets = prometheus.active_targets().into_iter();
            targets.filter(|target| target["labels"]["device_name"] == device_name).find(&fits)
        })
    }

    fn wait_for_value(&self, query: &str, expected: &str) {
        self.prometheus.wait_until(&format!("{query} is {expected}"), PATIENCE, |prometheus| {
            prometheus.query(query).iter().any(|(_, value)| value == expected).then_some(())
        });
    }
}

fn text(value: &Value) -> &str {
    value.as_str().expect("text")
}

fn prometheus_follows_the_fleet(major: u8) {
    let (node_exporter, mut fleet) = (NodeExporter::start(), demo_fleet());
    let commit = text(&find(&mut fleet, "fridge-01")["is_running__release"][0]["commit"]).to_owned();
    let uuid = text(&find(&mut fleet, "fridge-01")["uuid"]).to_owned();
    let cloud = Arc::new(Cloud::start(fleet));
    let exporters = Exporters::start(&cloud);
    exporters.forward(&uuid, node_exporter.addr());
    let chain = Chain::start(major, sidecar(&cloud).env("EXPORTERS", "node:80"), &exporters);

    // 24 devices, one of them with two exporters; the 25th does not want to be scraped.
    let targets = chain.prometheus.wait_until("25 targets", PATIENCE, |prometheus| {
        Some(prometheus.active_targets()).filter(|targets| targets.len() == 25)
    });
    assert!(targets.iter().all(|target| target["scrapePool"] == "balena"), "{targets:#?}");
    let jobs = |job| targets.iter().filter(|target| target["labels"]["job"] == job).count();
    assert_eq!((jobs("node"), jobs("app")), (24, 1));

    let mut target = chain.wait_for_target("fridge-01 is up", "fridge-01", |target| target["health"] == "up");
    let address = format!("{uuid}.balena:80");
    let labels = json!({
        "commit": commit,
        "device_name": "fridge-01",
        "device_type": "raspberrypi4-64",
        "fleet": "polar-foods/cold-chain",
        "instance": address,
        "job": "node",
        "os_variant": "prod",
        "os_version": "balenaOS 6.1.24",
        "supervisor_version": "16.7.6",
        "uuid": uuid,
    });
    assert_eq!(target["labels"], labels);
    let mut discovered = labels;
    discovered.as_object_mut().expect("labels").remove("instance");
    for (name, value) in [
        ("__address__", address.as_str()),
        ("__meta_balena_device_id", "9310004"),
        ("__meta_balena_exporter", "node"),
        ("__meta_balena_fleet_id", "1704211"),
        ("__meta_balena_fleet_name", "cold-chain"),
        ("__meta_balena_fleet_tag_env", "production"),
        ("__meta_balena_fleet_tag_prometheus_io_interval", "5s"),
        ("__meta_balena_organization", "polar-foods"),
        ("__meta_balena_release", "1.9.0"),
        ("__meta_balena_tag_site", "Tromsø harbour, hall 2"),
        ("__metrics_path__", "/metrics"),
        ("__scheme__", "http"),
        ("__scrape_interval__", "5s"),
        ("__scrape_timeout__", "5s"),
    ] {
        discovered[name] = value.into();
    }
    let file = target["discoveredLabels"].as_object_mut().expect("labels").remove("__meta_filepath");
    assert!(file.is_some_and(|file| text(&file).ends_with("/balena.json")));
    assert_eq!(target["discoveredLabels"], discovered);

    chain.wait_for_value(r#"up{device_name="fridge-01"}"#, "1");
    let series = chain.prometheus.query(r#"node_load1{device_name="fridge-01", job="node"}"#);
    assert!(matches!(&*series, [(_, load)] if load.parse::<f64>().is_ok()), "{series:?}");
    // Which only the real one says of itself.
    assert_eq!(chain.prometheus.query(r#"scrape_samples_scraped{device_name="fridge-01", job="node"} > 100"#).len(), 1);
    chain.wait_for_value(r#"up{device_name="gw-oslo", job="app"}"#, "1");

    let down = chain.wait_for_target("fridge-03 is down", "fridge-03", |target| target["health"] == "down");
    assert_eq!(down["lastError"], "server returned HTTP status 502 device not connected to the VPN");
    chain.wait_for_value(r#"up{device_name="fridge-03"}"#, "0");

    cloud.change(|devices| devices.push(sibling(&devices[1], 9_320_000, "fridge-06")));
    chain.wait_for_target("fridge-06 is up", "fridge-06", |target| target["health"] == "up");

    let commit = cloud.change(|devices| {
        let device = find(devices, "fridge-02");
        set_release(device, "1.10.0");
        text(&device["is_running__release"][0]["commit"]).to_owned()
    });
    let target =
        chain.wait_for_target("fridge-02's release", "fridge-02", |target| target["labels"]["commit"] == *commit);
    assert_eq!(target["discoveredLabels"]["__meta_balena_release"], "1.10.0");
    chain.wait_for_value(&format!(r#"up{{device_name="fridge-02", commit="{commit}"}}"#), "1");

    cloud.change(|devices| devices.retain(|device| device["device_name"] != "fridge-06"));
    chain.prometheus.wait_until("fridge-06 is gone", PATIENCE, |prometheus| {
        let targets = prometheus.active_targets();
        targets.iter().all(|target| target["labels"]["device_name"] != "fridge-06").then_some(())
    });
    assert_eq!(chain.prometheus.active_targets().len(), 25);
    assert_eq!(chain.prometheus.own_metric("prometheus_sd_file_read_errors_total"), 0.0);
}

#[test]
fn prometheus_2_follows_the_fleet() {
    prometheus_follows_the_fleet(2);
}

#[test]
fn prometheus_3_follows_the_fleet() {
    prometheus_follows_the_fleet(3);
}

/// https targets, which Prometheus reaches by a CONNECT of its own.
fn prometheus_scrapes_https(major: u8) {
    let (authority, mut fleet) = (Authority::generate(), demo_fleet());
    for name in ["fridge-01", "fridge-03"] {
        set_tag(find(&mut fleet, name), "prometheus.io/scheme", "https");
    }
    let uuid = text(&find(&mut fleet, "fridge-01")["uuid"]).to_owned();
    let mut config = authority.server(&[&format!("{uuid}.balena")]);
    Arc::make_mut(&mut config).alpn_protocols.clear(); // the exporter speaks HTTP/1.1, and Prometheus would rather have h2
    let exporter = Cloud::start_over((Ipv4Addr::LOCALHOST, 0).into(), Vec::new(), move |stream| {
        let connection = ServerConnection::new(config.clone()).map_err(std::io::Error::other)?;
        Ok(StreamOwned::new(connection, stream))
    });
    exporter.intercept(|_, _| Some(Reply::status(200, &[("Content-Type", "text/plain; version=0.0.4")], b"warm 1\n")));
    let cloud = Arc::new(Cloud::start(fleet));
    let exporters = Exporters::start(&cloud);
    let addr = exporter.url().rsplit('/').next().and_then(|addr| addr.parse().ok()).expect("its address");
    exporters.forward(&uuid, addr);
    let sidecar = sidecar(&cloud);
    fs::write(sidecar.path("ca.pem"), authority.pem()).expect("written");
    let chain = Chain::start_with(major, sidecar, &exporters, "    tls_config:\n      ca_file: ca.pem\n");
    chain.wait_for_value(r#"up{device_name="fridge-01"}"#, "1");
    assert_eq!(chain.prometheus.query(r#"warm{device_name="fridge-01"}"#).len(), 1);
    let down = chain.wait_for_target("fridge-03 is down", "fridge-03", |target| target["health"] == "down");
    let error = text(&down["lastError"]);
    assert!(error.ends_with("device not connected to the VPN"), "{error}");
}

#[test]
fn prometheus_2_scrapes_https() {
    prometheus_scrapes_https(2);
}

#[test]
fn prometheus_3_scrapes_https() {
    prometheus_scrapes_https(3);
}

/// With addresses that lead nowhere: those for documentation.
fn unreachable_fleet() -> Vec<Value> {
    let mut all = demo_fleet();
    let devices = [
        ("fridge-01", 11, "127.0.0.1 192.0.2.11 2001:db8::11"),
        ("fridge-02", 12, "fe80::12 2001:db8::12"), // without a public URL
        ("gw-oslo", 13, "192.0.2.13"),
        ("lamp-0007", 14, ""),
    ];
    let device = |(name, number, addresses): (&str, u8, &str)| {
        let mut device = find(&mut all, name).clone();
        (device["uuid"], device["ip_address"]) = (format!("{number:032}").into(), addresses.into());
        device
    };
    devices.map(device).into()
}

/// Expects these targets, each with its name, job and URL, and that the tunnel is asked for none of them.
fn expect_direct(major: u8, mode: &str, expected: &[(&str, &str, &str)]) {
    let cloud = Arc::new(Cloud::start(unreachable_fleet()));
    let exporters = Exporters::start(&cloud);
    let sidecar = sidecar(&cloud)
        .env("TARGET_ADDRESS", mode)
        .env("LAN_NETWORKS", "192.0.2.0/24,2001:db8::/64")
        .env("PUBLIC_URL_DOMAIN", "devices.invalid");
    let chain = Chain::start(major, sidecar, &exporters);
    let targets = chain.prometheus.wait_until("all targets", PATIENCE, |prometheus| {
        Some(prometheus.active_targets()).filter(|targets| targets.len() == expected.len())
    });
    assert!(targets.iter().all(|target| target["scrapePool"] == "balena-direct"), "{targets:#?}");
    let label = |target: &Value, name: &str| text(&target["labels"][name]).to_owned();
    let seen = targets
        .iter()
        .map(|target| (label(target, "device_name"), label(target, "job"), text(&target["scrapeUrl"]).to_owned()));
    let expected = expected.iter().map(|(name, job, url)| ((*name).to_owned(), (*job).to_owned(), (*url).to_owned()));
    assert_eq!(seen.collect::<BTreeSet<_>>(), expected.collect());
    assert_eq!(exporters.vpn.requests(), [""; 0], "{}", chain.tunnel.log().join("\n"));
    assert_eq!(chain.prometheus.own_metric("prometheus_sd_file_read_errors_total"), 0.0);
}

fn public_urls_are_reached_directly(major: u8) {
    expect_direct(
        major,
        "public",
        &[
            ("fridge-01", "balena", "https://00000000000000000000000000000011.devices.invalid:443/metrics"),
            ("gw-oslo", "node", "https://00000000000000000000000000000013.devices.invalid:443/metrics"),
            ("gw-oslo", "app", "https://00000000000000000000000000000013.devices.invalid:443/internal/metrics"),
            ("lamp-0007", "balena", "https://00000000000000000000000000000014.devices.invalid:443/metrics"),
        ],
    );
}

fn lan_addresses_are_reached_directly(major: u8) {
    expect_direct(
        major,
        "lan",
        &[
            ("fridge-01", "balena", "http://192.0.2.11:80/metrics"),
            ("fridge-02", "balena", "http://[2001:db8::12]:80/metrics"),
            ("gw-oslo", "node", "http://192.0.2.13:80/metrics"),
            ("gw-oslo", "app", "http://192.0.2.13:8080/internal/metrics"),
        ],
    );
}

#[test]
fn prometheus_2_reaches_public_urls_directly() {
    public_urls_are_reached_directly(2);
}

#[test]
fn prometheus_3_reaches_public_urls_directly() {
    public_urls_are_reached_directly(3);
}

#[test]
fn prometheus_2_reaches_lan_addresses_directly() {
    lan_addresses_are_reached_directly(2);
}

#[test]
fn prometheus_3_reaches_lan_addresses_directly() {
    lan_addresses_are_reached_directly(3);
}

/// Two services of a device, with `job` from their labels, through the tunnel; and a release that brings one exporter more.
fn prometheus_scrapes_what_services_declare(major: u8) {
    const NODE: Service<'static> =
        ("node-exporter", &[("prometheus.io.port", "9100"), ("prometheus.io.job", "node")], &[]);
    const APP: Service<'static> =
        ("app", &[("prometheus.io.port", "8080"), ("prometheus.io.path", "/internal/metrics")], &[]);
    let mut fleet = demo_fleet();
    let [old, new] = ["7.0.0", "7.1.0"].map(|version| {
        let mut device = find(&mut fleet, "fridge-01").clone();
        set_release(&mut device, version);
        running_release(&device)
    });
    for name in ["fridge-01", "fridge-04", "fridge-05"] {
        set_release(find(&mut fleet, name), "7.0.0");
    }
    let cloud = Arc::new(Cloud::start(fleet));
    cloud.set_services(old, &[NODE]);
    cloud.set_services(new, &[NODE, APP]);
    let exporters = Exporters::start(&cloud);
    let sidecar = sidecar(&cloud).env("EXPORTERS", "none").env("SERVICE_LABELS", "true");
    let chain = Chain::start(major, sidecar, &exporters);
    let up = |name: &str| -> Vec<(String, String, String)> {
        let series = chain.prometheus.query(&format!("up{{device_name=\"{name}\"}}"));
        let label = |labels: &BTreeMap<String, String>, name: &str| labels.get(name).cloned().unwrap_or_default();
        let mut found: Vec<_> = series
            .into_iter()
            .map(|(labels, value)| (label(&labels, "job"), label(&labels, "commit"), value))
            .collect();
        found.sort();
        found
    };
    let jobs = |name: &str| up(name).into_iter().map(|(job, _, value)| format!("{job} {value}")).collect::<Vec<_>>();
    let wait = |name: &str, expected: &[&str]| {
        let what = format!("{name}: {expected:?}");
        chain.prometheus.wait_until(&what, PATIENCE, |_| (jobs(name) == expected).then_some(()));
    };
    for name in ["fridge-01", "fridge-04", "fridge-05"] {
        wait(name, &["node 1"]);
    }
    // The new release reaches one of three devices.
    cloud.change(|devices| set_release(find(devices, "fridge-04"), "7.1.0"));
    chain.wait_for_target("the new exporter", "fridge-04", |target| {
        target["labels"]["job"] == "app" && target["health"] == "up"
    });
    let path = chain.prometheus.active_targets().into_iter().find(|target| target["labels"]["job"] == "app");
    assert!(text(&path.unwrap()["scrapeUrl"]).ends_with(".balena:8080/internal/metrics"));
    for name in ["fridge-01", "fridge-05"] {
        assert_eq!(jobs(name), ["node 1"], "{name}");
    }
    chain.wait_for_value("app_queue_length{device_name=\"fridge-04\",job=\"app\"} >= bool 0", "1");
}

#[test]
fn prometheus_2_scrapes_what_services_declare() {
    prometheus_scrapes_what_services_declare(2);
}

#[test]
fn prometheus_3_scrapes_what_services_declare() {
    prometheus_scrapes_what_services_declare(3);
}

/// A job with a long time-out would drop a target with a shorter interval, which nothing shows.
#[test]
fn an_interval_of_a_tag_costs_no_target() {
    let mut fleet = vec![gateway(1), gateway(2), gateway(3)];
    set_tag(&mut fleet[0], "prometheus.io/interval", "30s");
    set_tag(&mut fleet[1], "prometheus.io/interval", "5s");
    let cloud = Cloud::start(fleet);
    let sidecar = sidecar(&cloud).env("OWN_TAGS", "all").env("EXPORTERS", "80");
    sidecar.oneshot();
    let config = sidecar.path("prometheus.yml");
    let job = "{ job_name: balena, scrape_interval: 60s, scrape_timeout: 50s, proxy_url: http://127.0.0.1:9, \
        file_sd_configs: [{ files: [balena.json] }] }";
    fs::write(&config, format!("scrape_configs: [{job}]\n")).expect("written");
    for major in [2, 3] {
        let prometheus = Prometheus::start(major, &config);
        let timeouts = prometheus.wait_until("the targets", PATIENCE, |prometheus| {
            let mut targets = prometheus.active_targets();
            targets.sort_by_key(|target| text(&target["labels"]["device_name"]).to_owned());
            let timeouts: Vec<_> = targets.iter().map(|target| text(&target["scrapeTimeout"]).to_owned()).collect();
            (timeouts.len() == 3).then_some(timeouts)
        });
        assert_eq!(timeouts, ["10s", "5s", "50s"], "Prometheus {major}");
    }
}
