//! One hostile device against the stack's Prometheus, which has the memory that the stack gives it. Each test is one attack, within the
//! limits of `prometheus.yml` as far as it can be. It lasts until an alert names the device and then to the end of the time: Prometheus
//! does not end, and has all that the honest devices sent since the start.
//!
//! `scripts/full hostile` runs all of them for `MINUTES` (30). `HONEST` (25) is the number of honest devices, `FACTOR=12` divides all times
//! by 12, those of the rules too. By default the device's own tags do not give it more than its fleet has: one exporter. With
//! `OWN_TAGS=all`, it has `EXPORTERS` (16) of its own, and Prometheus may end. It needs root, for a memory limit by cgroup.

pub mod support {
    pub mod alerts;
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
use std::path::Path;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use regex::{Captures, Regex};
use serde_json::{Value, json};
use support::alerts::rule_files;
use support::cloud::{Cloud, KEY};
use support::fleet::gateways;
use support::limited::{Group, Prometheus, ROOT, configure, free_port, mem_limit, number};
use support::sidecar::Sidecar;
use support::vpn::{Device, Vpn};

/// Just below `body_size_limit`.
const BODY_SIZE: usize = 290_000;
/// What the stack stores of an exporter of examples/thingy.
const HONEST_SAMPLES: usize = 100;
/// The exporter that the whole fleet has.
const FLEET_PORT: u16 = 9100;
/// Of the exporters that the device gives to itself.
const FIRST_PORT: u16 = 9101;

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

/// Text that does not get smaller by compression, other for each number.
fn noise(number: u64, length: usize) -> String {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b'0' + u8::try_from(state >> 59).expect("5 bits"))
    };
    (0..length).map(next).collect()
}

/// Lines until there are so many, or the answer is as large as it may be.
fn lines(most: usize, size: usize, line: impl Fn(usize) -> String) -> String {
    let mut text = String::new();
    for number in 0..most {
        let line = line(number);
        if text.len() + line.len() > size {
            break;
        }
        text += &line;
    }
    text
}

/// As many new series as the limits allow.
fn series(scrape: u64) -> String {
    lines(1990, BODY_SIZE, |sample| format!("h{{v=\"{scrape}-{sample}-{:x<120}\"}} 1\n", ""))
}

/// Few new series with labels of random bytes.
fn labels(scrape: u64, count: usize, labels: usize, length: usize, size: usize) -> String {
    lines(count, size, |sample| {
        let value = |label: usize| noise(scrape * 10_000 + (sample * 100 + label) as u64, length);
        let all: Vec<_> = (0..labels).map(|label| format!("l{label}=\"{}\"", value(label))).collect();
        format!("h{{{}}} 1\n", all.join(","))
    })
}

/// One sample among descriptions of ever new metrics.
fn descriptions(scrape: u64) -> String {
    lines(usize::MAX, BODY_SIZE, |line| format!("# HELP h{scrape}_{line} x\n")) + "h 1\n"
}

/// Samples of metrics that no device may have, which relabelling drops before they are counted.
fn dropped(scrape: u64) -> String {
    lines(usize::MAX, BODY_SIZE, |sample| format!("up{{v=\"{scrape}-{sample}\"}} 1\n"))
}

fn honest(_: u64) -> String {
    (0..HONEST_SAMPLES).fold(String::new(), |mut text, sample| {
        let _ = writeln!(text, "figure_{}{{cpu=\"{}\"}} {sample}", sample / 4, sample % 4);
        text
    })
}

/// What the alert says of this device, once it fires.
fn alert(prometheus: &Prometheus, name: &str, uuid: &str) -> Option<String> {
    let answer = prometheus.get("alerts", &[])?;
    let alert = answer["data"]["alerts"].as_array()?.iter().find(|alert| {
        alert["labels"]["alertname"] == name && alert["labels"]["uuid"] == uuid && alert["state"] == "firing"
    })?;
    let text = |name: &str| alert["annotations"][name].as_str().unwrap_or_default().to_owned();
    Some(format!("{}. {}", text("summary"), text("description")))
}

/// Devices of the fleet, and one whose tags name its exporters. Its own tag mutes it, but not for the alerts about what it sends.
fn fleet(honest: u64, exporters: u16, interval: &str, muted: bool) -> Vec<Value> {
    let mut devices = gateways(honest + 1);
    let ports: Vec<_> = (0..exporters).map(|at| format!("e{at}:{}", FIRST_PORT + at)).collect();
    let hostile = devices.last_mut().expect("a device");
    hostile["device_name"] = json!("hostile");
    hostile["device_tag"] = json!([
        { "tag_key": "prometheus.io/exporters", "value": ports.join(",") },
        { "tag_key": "prometheus.io/interval", "value": interval },
        { "tag_key": "prometheus.io/alert", "value": (!muted).to_string() },
    ]);
    devices
}

/// Durations in rules and configurations, after these words.
static DURATION: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(\[|for: |interval: |timeout: |offset )(\d+)([smhd])").expect("an expression"));

/// All durations divided by the factor.
fn hurry(text: &str, factor: u64) -> String {
    let shorter = |found: &Captures| {
        let unit =
            [("s", 1), ("m", 60), ("h", 3600), ("d", 86400)].iter().find(|unit| unit.0 == &found[3]).expect("one");
        let seconds = found[2].parse::<u64>().expect("a number") * unit.1;
        format!("{}{}s", &found[1], (seconds / factor).max(1))
    };
    DURATION.replace_all(text, shorter).into_owned()
}

struct Attack {
    /// The alert that names the device.
    alert: &'static str,
    body: fn(u64) -> String,
    /// Whether it has another name at each refresh.
    renames: bool,
}

/// The stack's configuration in the folder, and its rules; both as fast as the factor says.
fn write(folder: &Path, sidecar: &Sidecar, others: &[(&str, &str)], factor: u64) {
    configure(folder, sidecar, others);
    let (file, rules) = (folder.join("etc/prometheus.yml"), folder.join("rules"));
    let config = fs::read_to_string(&file).expect("the configuration");
    let own = "scrape_interval: 60s\n  evaluation_interval: 60s\n  scrape_timeout: 60s\n";
    let config = config
        .replace(&format!("{ROOT}/alerts"), rules.to_str().expect("a path"))
        .replace("scrape_interval: 60s\n", if factor > 1 { own } else { "scrape_interval: 60s\n" });
    fs::write(&file, hurry(&config, factor)).expect("written");
    fs::create_dir(&rules).expect("a folder");
    for path in rule_files() {
        let text = fs::read_to_string(&path).expect("rules");
        fs::write(rules.join(path.file_name().expect("a name")), hurry(&text, factor)).expect("written");
    }
}

/// The bytes of the files in a folder.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let each = |entry: fs::DirEntry| match entry.metadata() {
        Ok(about) if about.is_dir() => size(&entry.path()),
        Ok(about) => about.len(),
        Err(_) => 0, // Prometheus has deleted it
    };
    entries.map(each).sum()
}

fn run(name: &str, attack: &Attack) {
    let own_tags = env::var("OWN_TAGS").unwrap_or_else(|_| "narrow".into());
    let (minutes, honest_devices, factor) = (number("MINUTES", 30), number("HONEST", 25), number("FACTOR", 1));
    let exporters = u16::try_from(number("EXPORTERS", 16)).expect("a few");
    let _ = rustls::crypto::ring::default_provider().install_default();
    let interval = format!("{}s", 60 / factor);
    let cloud = Cloud::start(fleet(honest_devices, exporters, &interval, attack.alert != "DeviceOnlineButNotScraped"));
    let (good, bad) = (serve(honest), serve(attack.body));
    let uuid = format!("{:032x}", honest_devices + 1);
    let hostile_uuid = uuid.clone();
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
        .env("LABELS", "device_name,fleet,device_type")
        .env("OWN_TAGS", &*own_tags)
        .env("REFRESH_RATE", &*interval)
        .env("LISTEN_ADDRESS", &*status);
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    let (_tunnel, tunnel) = sidecar.tunnel(&vpn.url());
    let folder = tempfile::tempdir().expect("a folder");
    let (limit, port) = (mem_limit(), free_port());
    let (tunnel_host, own) = (tunnel.trim_start_matches("http://"), format!("localhost:{port}"));
    let others = [
        ("http://tunnel:9798", &*tunnel),
        ("tunnel:9798", tunnel_host),
        ("baletheus:9797", &status),
        ("localhost:9090", &own),
    ];
    write(folder.path(), &sidecar, &others, factor);

    let group = Group::new(limit);
    let args = [format!("--storage.tsdb.min-block-duration={}s", 1800 / factor)];
    let mut prometheus = Prometheus::start(folder.path(), &group, port, &args);
    let start = Instant::now();
    let minute = Duration::from_secs(60) / u32::try_from(factor).expect("a small number");
    let (mut ended, mut named, mut most, mut first) = (0, None, 0, None);
    for at in 1..=minutes {
        if attack.renames {
            cloud.change(|devices| devices.last_mut().expect("it")["device_name"] = json!(format!("hostile {at}")));
        }
        while start.elapsed() < minute * u32::try_from(at).expect("minutes") {
            thread::sleep(Duration::from_millis(500));
            most = most.max(group.own());
            if prometheus.end().is_some() {
                ended += 1;
                println!("{name}: Prometheus has ended in minute {at}, time {ended}");
                prometheus = Prometheus::start(folder.path(), &group, port, &args);
            }
            if named.is_none() {
                named = alert(&prometheus, attack.alert, &uuid).inspect(|text| {
                    println!("{name}: {} fires in minute {at}: {text}", attack.alert);
                });
            }
        }
        cloud.clear_requests();
        vpn.clear_requests();
        let up = prometheus.value("count(up{device_name=~\"gw-.*\"} == 1)");
        if up == honest_devices as f64 {
            first = first.or_else(|| Some(prometheus.value("vector(time())")));
        }
        let [series, entries] = ["prometheus_tsdb_head_series", "sum(prometheus_target_metadata_cache_entries)"]
            .map(|query| prometheus.value(query));
        println!(
            "{name}: minute {at}: {series} series, {entries} descriptions, at most {} MiB of {}, with files {} MiB, {} kB on disk, honest up {up}",
            most >> 20,
            limit >> 20,
            group.peak() >> 20,
            size(&folder.path().join("data")) / 1000,
        );
    }
    assert!(named.is_some(), "{name}: no {} names the device", attack.alert);
    if own_tags == "all" {
        return;
    }
    assert_eq!(
        ended,
        0,
        "{name}: Prometheus ended {ended} times:\n{}",
        fs::read_to_string(folder.path().join("log")).unwrap()
    );
    let now = prometheus.value("count(up{device_name=~\"gw-.*\"} == 1)");
    let time = first.expect("all honest devices were up").to_string();
    let then = prometheus.get("query", &[("query", "count(up{device_name=~\"gw-.*\"} == 1)"), ("time", &time)]);
    let then = then.expect("an answer")["data"]["result"][0]["value"][1].as_str().map(str::to_owned);
    assert_eq!(
        (now, then),
        (honest_devices as f64, Some(honest_devices.to_string())),
        "{name}: history of honest devices"
    );
    let updates = running.log().iter().filter(|line| line.contains("updated balena.json")).count();
    println!("{name}: the target file of {} bytes was written {updates} times", sidecar.list().len());
}

#[test]
#[ignore = "it takes as long as it is told to, and needs root"]
fn new_series() {
    run("series", &Attack { alert: "SeriesChurn", body: series, renames: false });
}

#[test]
#[ignore = "it takes as long as it is told to, and needs root"]
fn labels_of_random_bytes() {
    run(
        "labels",
        &Attack { alert: "AnswersTooLarge", body: |scrape| labels(scrape, 35, 22, 510, BODY_SIZE), renames: false },
    );
}

/// What the limits refuse is not stored.
#[test]
#[ignore = "it takes as long as it is told to, and needs root"]
fn labels_above_the_limits() {
    let body = |scrape| labels(scrape, 35, 28, 1000, usize::MAX);
    run("limits", &Attack { alert: "DeviceOnlineButNotScraped", body, renames: false });
}

#[test]
#[ignore = "it takes as long as it is told to, and needs root"]
fn descriptions_of_new_metrics() {
    run("descriptions", &Attack { alert: "AnswersTooLarge", body: descriptions, renames: false });
}

#[test]
#[ignore = "it takes as long as it is told to, and needs root"]
fn samples_that_are_dropped() {
    run("dropped", &Attack { alert: "AnswersTooLarge", body: dropped, renames: false });
}

#[test]
#[ignore = "it takes as long as it is told to, and needs root"]
fn a_new_name_at_each_refresh() {
    run("names", &Attack { alert: "SeriesChurn", body: honest, renames: true });
}
