//! One hostile device against the stack's Prometheus: 16 exporters, each with as much as the limits of `prometheus.yml` allow, and
//! all of it new at each scrape. Prometheus has the memory that the stack gives it. Measured: whether it stays alive, and when an
//! alert names the device.
//!
//! By default the device's own tags do not give it more than its fleet has: one exporter. With `OWN_TAGS=all` it has all of its own.
//! `scripts/full hostile` runs it for `MINUTES` (20). `EXPORTERS` (16) and `HONEST` (25) change what it is about. It needs root, for a
//! memory limit by cgroup.

pub mod support {
    pub mod cloud;
    pub mod fleet;
    pub mod limited;
    pub mod odata;
    pub mod recording;
    pub mod sidecar;
    pub mod tools;
    pub mod vpn;
}

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::cloud::{Cloud, KEY};
use support::fleet::gateways;
use support::limited::{Group, Prometheus, configure, free_port, mem_limit, number};
use support::sidecar::Sidecar;
use support::vpn::{Device, Vpn};

/// Below `sample_limit`, and with these values below `body_size_limit`.
const SAMPLES: usize = 1990;
const VALUE_LENGTH: usize = 440;
/// What the stack stores of an exporter of examples/thingy.
const HONEST_SAMPLES: usize = 100;
/// The exporter that the whole fleet has.
const FLEET_PORT: u16 = 9100;
/// Of the exporters that the device gives to itself.
const FIRST_PORT: u16 = 9101;
/// How often the device asks to be scraped.
const INTERVAL: &str = "1m";

/// Answers each request with what `body` makes for its number.
fn serve(body: impl Fn(u64) -> String + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("its address");
    let count = AtomicU64::new(0);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = answer(&stream, &body(count.fetch_add(1, Ordering::Relaxed))); // whoever asked may be gone
        }
    });
    addr
}

fn answer(mut stream: &TcpStream, body: &str) -> std::io::Result<()> {
    let lines = BufReader::new(stream).lines();
    lines.map_while(Result::ok).take_while(|line| !line.is_empty()).for_each(drop);
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(body.as_bytes())
}

fn hostile(scrape: u64) -> String {
    let mut text = String::new();
    for sample in 0..SAMPLES {
        let value = format!("{scrape}-{sample}-");
        let _ = writeln!(text, "h{{v=\"{value:x<VALUE_LENGTH$}\"}} 1");
    }
    text
}

fn honest(_: u64) -> String {
    (0..HONEST_SAMPLES).fold(String::new(), |mut text, sample| {
        let _ = writeln!(text, "figure_{}{{cpu=\"{}\"}} {sample}", sample / 4, sample % 4);
        text
    })
}

/// The state of the alert on new series that names this device.
fn alert(prometheus: &Prometheus, device: &str) -> Option<String> {
    let answer = prometheus.get("alerts", &[])?;
    let alert = answer["data"]["alerts"].as_array()?.iter().find(|alert| {
        let summary = alert["annotations"]["summary"].as_str().unwrap_or_default();
        alert["labels"]["alertname"] == "SeriesChurn" && summary.starts_with(&format!("{device} ("))
    })?;
    alert["state"].as_str().map(str::to_owned)
}

/// A device of the fleet, and one whose tags name its exporters.
fn fleet(honest: u64, exporters: u16) -> Vec<Value> {
    let mut devices = gateways(honest + 1);
    let ports: Vec<_> = (0..exporters).map(|at| format!("e{at}:{}", FIRST_PORT + at)).collect();
    let hostile = devices.last_mut().expect("a device");
    hostile["device_name"] = json!("hostile");
    hostile["device_tag"] = json!([
        { "tag_key": "prometheus.io/exporters", "value": ports.join(",") },
        { "tag_key": "prometheus.io/interval", "value": INTERVAL },
        { "tag_key": "prometheus.io/alert", "value": "false" },
    ]);
    devices
}

#[test]
#[ignore = "it takes as long as it is told to, and needs root"]
fn one_hostile_device_does_not_end_prometheus() {
    let own_tags = env::var("OWN_TAGS").unwrap_or_else(|_| "narrow".into());
    let (minutes, honest_devices) = (number("MINUTES", 20), number("HONEST", 25));
    let exporters = u16::try_from(number("EXPORTERS", 16)).expect("a few");
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cloud = Cloud::start(fleet(honest_devices, exporters));
    let (good, bad) = (serve(honest), serve(hostile));
    let hostile_uuid = format!("{:032x}", honest_devices + 1);
    let vpn = Vpn::start_with(KEY, move |uuid| {
        let mut device = Device::default();
        let is_hostile = uuid == hostile_uuid;
        device.ports.insert(FLEET_PORT, if is_hostile { bad } else { good });
        device.ports.extend((0..exporters).filter(|_| is_hostile).map(|at| (FIRST_PORT + at, bad)));
        Some(device)
    });
    let status = format!("127.0.0.1:{}", free_port());
    let sidecar = Sidecar::of(env!("CARGO_BIN_EXE_baletheus"), &cloud)
        .env("EXPORTERS", format!("node:{FLEET_PORT}"))
        .env("OWN_TAGS", &*own_tags)
        .env("REFRESH_RATE", "30s")
        .env("LISTEN_ADDRESS", &*status);
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    let (_tunnel, tunnel) = sidecar.tunnel(&vpn.url());
    let folder = tempfile::tempdir().expect("a folder");
    let tunnel_host = tunnel.trim_start_matches("http://");
    let others = [("http://tunnel:9798", &*tunnel), ("tunnel:9798", tunnel_host), ("baletheus:9797", &status)];
    configure(folder.path(), &sidecar, &others);

    let (limit, port) = (mem_limit(), free_port());
    let group = Group::new(limit);
    let mut prometheus = Prometheus::start(folder.path(), &group, port, &[]);
    let start = Instant::now();
    let (mut ended, mut named, mut own) = (0, None, 0);
    println!(
        "limit {} MiB, {honest_devices} honest devices, a hostile one with {exporters} exporters, OWN_TAGS={own_tags}",
        limit >> 20
    );
    for minute in 1..=minutes {
        while start.elapsed() < Duration::from_secs(60 * minute) {
            thread::sleep(Duration::from_secs(1));
            own = own.max(group.own());
            if prometheus.end().is_some() {
                ended += 1;
                println!("{:>5} s: Prometheus has ended, time {ended}", start.elapsed().as_secs());
                prometheus = Prometheus::start(folder.path(), &group, port, &[]);
            }
            if named.is_none() && alert(&prometheus, "hostile").as_deref() == Some("firing") {
                named = Some(start.elapsed().as_secs());
                println!("{:>5} s: SeriesChurn names the device", start.elapsed().as_secs());
            }
        }
        cloud.clear_requests();
        vpn.clear_requests();
        let up = prometheus.value("count(up{device_name=~\"gw-.*\"} == 1)");
        let rejected = prometheus.value("count(up{device_name=\"hostile\"} == 0)");
        let series = prometheus.get("status/tsdb", &[]).unwrap_or_default()["data"]["headStats"]["numSeries"].take();
        let (most, peak) = (own >> 20, group.peak() >> 20);
        println!(
            "{minute:>3} min: {series} series, at most {most} MiB, with files {peak} MiB, honest up {up}, hostile refused {rejected}"
        );
    }
    assert!(named.is_some() || minutes < 15, "no alert names the device");
    if own_tags == "all" {
        println!("Prometheus ended {ended} times");
        return;
    }
    assert_eq!(ended, 0, "Prometheus ended {ended} times:\n{}", fs::read_to_string(folder.path().join("log")).unwrap());
}
