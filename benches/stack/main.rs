//! What the stack's Prometheus takes: memory, card and time for so many devices, through a release to all of them at half time and a
//! restart at three quarters, with the dashboards open. `scripts/bench stack` runs it, and says what can be set.
//!
//! Prometheus, its entry point, its configuration and rules, the sidecar, the tunnel and one node_exporter are the real ones.
//! balenaCloud, its VPN, Alertmanager, Grafana and the devices are simulated; each device answers as that node_exporter does on the
//! files of a Raspberry Pi 4.

mod devices;
mod panels;
#[path = "../../tests/support"]
pub mod support {
    pub mod alerts;
    pub mod cloud;
    pub mod fleet;
    pub mod grafana;
    pub mod limited;
    pub mod node_exporter;
    pub mod odata;
    pub mod raspberry;
    pub mod recording;
    pub mod sidecar;
    pub mod tools;
    pub mod vpn;
}

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use reqwest::blocking::Client;
use serde_json::{Value, json};

use devices::{Devices, Page};
use panels::{Asked, Query};
use support::alerts::{read, rule_files};
use support::cloud::{Cloud, KEY, Reply};
use support::fleet::{many, set_release};
use support::grafana::{list, text};
use support::limited::{Group, Prometheus, ROOT, compose, configure, free_port, mem_limit, number};
use support::node_exporter::flags_of;
use support::raspberry;
use support::sidecar::{Running, Sidecar, send};
use support::vpn::{Device, Vpn};

/// The port of the exporter.
const PORT: u16 = 9100;
/// How often the dashboards ask.
const ASK: u64 = 30;

struct Plan {
    devices: u64,
    minutes: u64,
    /// All times are divided by this.
    factor: u64,
    example: String,
    args: Vec<String>,
}

impl Plan {
    fn read() -> Self {
        let (args, rest): (Vec<_>, Vec<_>) =
            env::args().skip(1).filter(|arg| arg != "--bench").partition(|arg| arg.starts_with("--"));
        let devices = rest.first().map_or(200, |number| number.parse().expect("a number of devices"));
        let example = env::var("EXAMPLE").unwrap_or_else(|_| "examples/thingy/docker-compose.yml".into());
        Self { devices, minutes: number("MINUTES", 30), factor: number("FACTOR", 1), example, args }
    }

    fn seconds(&self, seconds: u64) -> Duration {
        Duration::from_secs(seconds) / u32::try_from(self.factor).expect("a small number")
    }
}

fn main() {
    let plan = Plan::read();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir_in(Path::new(ROOT).join("target")).expect("a folder on a disk");
    let (stack, page) = Stack::start(&plan, folder.path());
    let limit = env::var("MEM_LIMIT").map_or_else(|_| mem_limit(), |_| number("MEM_LIMIT", 0) << 20);
    println!(
        "{} devices, each with {} samples of {}, {} bytes with gzip; Prometheus in {} MiB; {} minutes{}; {:?}",
        plan.devices,
        page.0,
        plan.example,
        page.1,
        limit >> 20,
        plan.minutes,
        if plan.factor > 1 { format!(", all times divided by {}", plan.factor) } else { String::new() },
        plan.args
    );
    let group = Group::new(limit);
    let mut run = Run::new(&plan, &stack, &group, folder.path());
    let queries = Arc::new(panels::queries(&stack.device));
    let asked = panels::keep_asking(run.prometheus.url.clone(), queries.clone(), plan.seconds(ASK));
    run.watch();
    run.report(&asked.lock().expect("no thread has panicked"), &queries);
}

/// What runs around Prometheus, and ends with it.
struct Stack {
    cloud: Cloud,
    device: String,
    port: u16,
    _sidecar: Sidecar,
    _running: [Running; 2],
    _vpn: Vpn,
    _others: Cloud,
}

/// The page of a node_exporter on a Raspberry Pi, and its size with gzip.
fn page(folder: &Path, example: &str) -> (String, usize) {
    let (_exporter, address) = raspberry::start(folder, &flags_of(example));
    let client = Client::builder().no_proxy().no_gzip().build().expect("a client");
    let get = |coding| {
        let request = client.get(format!("http://{address}/metrics")).header("accept-encoding", coding);
        request.send().and_then(|answer| answer.error_for_status()?.bytes()).expect("a page")
    };
    let (plain, packed) = (get("identity"), get("gzip"));
    // Perhaps nothing sets the clock of this machine; each device would have an alert.
    let page = String::from_utf8(plain.to_vec()).expect("UTF-8");
    (page.replace("node_timex_sync_status 0", "node_timex_sync_status 1"), packed.len())
}

impl Stack {
    fn start(plan: &Plan, folder: &Path) -> (Self, (usize, usize)) {
        let (answer, size) = page(&folder.join("board"), &plan.example);
        let page = Page::parse(&answer);
        let samples = page.samples();
        let address = Devices::serve(page);
        let cloud = Cloud::start(fleet(plan.devices));
        let device = cloud.change(|devices| text_of(&devices[0], "uuid"));
        let vpn = Vpn::start_with(KEY, move |_| {
            let mut device = Device::default();
            device.ports.insert(PORT, address);
            Some(device)
        });
        let (status, port) = (format!("127.0.0.1:{}", free_port()), free_port());
        let example: Value = read(&Path::new(ROOT).join(&plan.example));
        let job = text(&example["services"]["node-exporter"]["labels"], "prometheus.io.job").to_owned();
        let mut sidecar = Sidecar::of(env::var("BALETHEUS").expect("BALETHEUS is not set: run scripts/bench"), &cloud);
        let settings = compose()["services"]["baletheus"]["environment"].take();
        for (name, value) in settings.as_object().expect("its variables") {
            sidecar = sidecar.env(name, value.as_str().expect("text"));
        }
        if let Ok(labels) = env::var("LABELS") {
            sidecar = sidecar.env("LABELS", labels);
        }
        let every = format!("{}ms", plan.seconds(60).as_millis());
        let sidecar = sidecar.env("EXPORTERS", format!("{job}:{PORT}")).env("REFRESH_RATE", &every);
        let sidecar = sidecar.env("DEVICE_REFRESH_RATE", &every).env("LISTEN_ADDRESS", &status);
        let running = sidecar.start();
        running.wait_for("updated balena.json");
        let (tunnel, proxy) = sidecar.tunnel(&vpn.url());
        let others = quiet();
        let (host, own) = (others.url().replace("http://", ""), format!("127.0.0.1:{port}"));
        configure(
            folder,
            &sidecar,
            &[
                ("http://tunnel:9798", &proxy),
                ("tunnel:9798", proxy.trim_start_matches("http://")),
                ("baletheus:9797", &status),
                ("alertmanager:9093", &host),
                ("grafana:3000", &host),
                ("localhost:9090", &own),
            ],
        );
        if plan.factor > 1 {
            hurry(plan, folder);
        }
        let stack =
            Stack { cloud, device, port, _sidecar: sidecar, _running: [running, tunnel], _vpn: vpn, _others: others };
        (stack, (samples, size))
    }
}

fn text_of(value: &Value, key: &str) -> String {
    text(value, key).to_owned()
}

/// Devices that ask for no interval.
fn fleet(count: u64) -> Vec<Value> {
    let mut devices = many(count);
    for device in &mut devices {
        device["belongs_to__application"][0]["application_tag"] = json!([]);
        set_release(device, "1.0.0");
    }
    devices
}

/// An Alertmanager that takes all alerts, and a Grafana.
fn quiet() -> Cloud {
    let server = Cloud::start(Vec::new());
    let page = b"process_resident_memory_bytes 3e7\n";
    let headers = [("Content-Type", "text/plain; version=0.0.4")];
    server.intercept(move |_, _| Some(Reply::status(200, &headers, page)));
    server
}

/// Intervals divided by the factor.
fn hurry(plan: &Plan, folder: &Path) {
    let (file, rules) = (folder.join("etc/prometheus.yml"), folder.join("rules"));
    let [minute, two] = [60, 120].map(|seconds| format!("{}ms", plan.seconds(seconds).as_millis()));
    let config = fs::read_to_string(&file)
        .expect("the configuration")
        .replace(&format!("{ROOT}/alerts"), rules.to_str().expect("a path"));
    let own = format!("scrape_interval: {minute}\n  evaluation_interval: {minute}\n  scrape_timeout: {minute}\n");
    fs::write(file, config.replace("scrape_interval: 60s\n", &own)).expect("written");
    fs::create_dir(&rules).expect("a folder");
    for path in rule_files() {
        let text =
            fs::read_to_string(&path).expect("rules").replace("    interval: 2m\n", &format!("    interval: {two}\n"));
        fs::write(rules.join(path.file_name().expect("a name")), text).expect("written");
    }
}

/// What Prometheus had used and stored when it was looked at last.
#[derive(Clone, Copy, Default)]
struct Used {
    /// In ticks of a hundredth of a second.
    cpu: u64,
    written: u64,
    samples: f64,
}

impl Used {
    fn of(prometheus: &Prometheus) -> Option<Self> {
        let id = prometheus.id();
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let cpu = fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
        let io = fs::read_to_string(format!("/proc/{id}/io")).ok()?;
        let field = |name| io.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        // What is deleted before it reaches the disk does not count.
        let written = field("write_bytes:")?.saturating_sub(field("cancelled_write_bytes:")?);
        let metrics = prometheus.text("metrics")?;
        let appended = |line: &str| {
            line.strip_prefix("prometheus_tsdb_head_samples_appended_total")?.rsplit(' ').next()?.parse().ok()
        };
        let samples: f64 = metrics.lines().filter_map(appended).map(|value: f64| value).sum();
        Some(Self { cpu, written, samples })
    }

    fn and(self, other: Self) -> Self {
        let (cpu, written) = (self.cpu + other.cpu, self.written + other.written);
        Self { cpu, written, samples: self.samples + other.samples }
    }
}

/// A part of the run, with the most memory in it, and the heap and the series at its end.
struct Part {
    name: &'static str,
    own: u64,
    heap: u64,
    series: u64,
}

struct Run<'a> {
    plan: &'a Plan,
    stack: &'a Stack,
    group: &'a Group,
    folder: &'a Path,
    prometheus: Prometheus,
    start: Instant,
    /// How often it was killed.
    ended: u32,
    /// Of the processes that have ended, and of the one that runs.
    used: [Used; 2],
    own: u64,
    parts: Vec<Part>,
}

impl<'a> Run<'a> {
    fn new(plan: &'a Plan, stack: &'a Stack, group: &'a Group, folder: &'a Path) -> Self {
        let prometheus = Prometheus::start(folder, group, stack.port, &plan.args);
        let (start, used, own) = (Instant::now(), [Used::default(); 2], 0);
        Self { plan, stack, group, folder, prometheus, start, ended: 0, used, own, parts: Vec::new() }
    }

    fn watch(&mut self) {
        let end = self.plan.minutes * 60;
        self.until(end / 2);
        self.part("before the release");
        self.stack.cloud.change(|devices| devices.iter_mut().for_each(|device| set_release(device, "2.0.0")));
        self.until(end * 3 / 4);
        self.part("after it");
        send(self.prometheus.id(), "TERM").expect("it runs");
        self.until(end);
        self.part("after the restart");
    }

    /// Looks at Prometheus each second, until so many seconds after the start.
    fn until(&mut self, seconds: u64) {
        let end = self.start + self.plan.seconds(seconds);
        while Instant::now() < end {
            thread::sleep(Duration::from_secs(1));
            self.own = self.own.max(self.group.own());
            self.used[1] = Used::of(&self.prometheus).unwrap_or(self.used[1]);
            if let Some(status) = self.prometheus.end() {
                if !status.success() {
                    println!("{} s: Prometheus has ended: {status}", self.start.elapsed().as_secs());
                    self.ended += 1;
                }
                self.used = [self.used[0].and(self.used[1]), Used::default()];
                self.prometheus = Prometheus::start(self.folder, self.group, self.stack.port, &self.plan.args);
            }
        }
    }

    fn part(&mut self, name: &'static str) {
        let status = self.prometheus.get("status/tsdb", &[]).unwrap_or_default();
        let series = status["data"]["headStats"]["numSeries"].as_u64().unwrap_or_default();
        // The profile collects garbage first.
        let profile = self.prometheus.text("debug/pprof/heap?debug=1&gc=1").unwrap_or_default();
        let heap =
            profile.lines().find_map(|line| line.strip_prefix("# HeapAlloc = ")?.parse().ok()).unwrap_or_default();
        self.parts.push(Part { name, own: std::mem::take(&mut self.own), heap, series });
    }

    fn report(&self, asked: &Asked, queries: &[Query]) {
        println!(
            "\n| part | most memory, MB | live heap at its end, MB | series at its end |\n| --- | ---: | ---: | ---: |"
        );
        for Part { name, own, heap, series } in &self.parts {
            println!("| {name} | {} | {} | {series} |", own / 1_000_000, heap / 1_000_000);
        }
        let used = self.used[0].and(self.used[1]);
        let hours = self.plan.minutes as f64 / 60.0;
        let wall = self.start.elapsed().as_secs_f64();
        println!(
            "\nPrometheus was killed {} times, and used at most {} MB with files.",
            self.ended,
            self.group.peak() / 1_000_000
        );
        println!("CPU: {:.1} % of a core.", used.cpu as f64 / wall);
        let per_hour = used.written as f64 / 1e6 / hours;
        println!("Written: {per_hour:.0} MB an hour, {:.1} bytes a sample.", used.written as f64 / used.samples);
        self.report_blocks();
        self.report_rules();
        let (mut rounds, mut slowest) = (asked.rounds.clone(), queries.iter().zip(&asked.slowest).collect::<Vec<_>>());
        rounds.sort();
        slowest.sort_by_key(|(_, time)| std::cmp::Reverse(**time));
        println!(
            "{} queries, asked {} times in {:.1} s (median), at most {:.1} s; {} had no answer. The slowest of each:",
            queries.len(),
            rounds.len(),
            rounds[rounds.len() / 2].as_secs_f64(),
            rounds[rounds.len() - 1].as_secs_f64(),
            asked.unanswered
        );
        for (query, time) in &slowest[..6] {
            println!("- {:.2} s {}", time.as_secs_f64(), query.name);
        }
    }

    /// What is on the disk.
    fn report_blocks(&self) {
        let (mut samples, mut bytes, mut series, mut count) = (0, 0, 0, 0);
        for entry in fs::read_dir(self.folder.join("data")).expect("its samples").flatten() {
            let Ok(meta) = fs::read_to_string(entry.path().join("meta.json")) else { continue };
            let meta: Value = serde_json::from_str(&meta).expect("JSON");
            samples += meta["stats"]["numSamples"].as_u64().unwrap_or_default();
            series += meta["stats"]["numSeries"].as_u64().unwrap_or_default();
            bytes += size(&entry.path());
            count += 1;
        }
        let log = ["wal", "chunks_head"].map(|name| size(&self.folder.join("data").join(name)) / 1_000_000);
        let each = bytes as f64 / samples as f64;
        println!(
            "On the disk: {count} blocks, {bytes} bytes, {samples} samples, {series} series: {each:.2} bytes a sample."
        );
        println!("Beside them {} MB of write-ahead log and {} MB of chunks.", log[0], log[1]);
    }

    fn report_rules(&self) {
        let rules = self.prometheus.get("rules", &[]).unwrap_or_default();
        let time = |rule: &Value| rule["evaluationTime"].as_f64().unwrap_or_default();
        let groups = list(&rules, "/data/groups");
        let mut all: Vec<_> = groups.iter().flat_map(|group| list(group, "/rules")).collect();
        all.sort_by(|one, other| time(other).total_cmp(&time(one)));
        let sum: f64 = all.iter().map(|rule| time(rule)).sum();
        let top = all.iter().take(3).map(|rule| format!("{} {:.2} s", text(rule, "name"), time(rule)));
        println!("{} rules take {sum:.2} s; the longest: {}.", all.len(), top.collect::<Vec<_>>().join(", "));
    }
}

/// Of all files in a folder, in bytes.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| {
        if entry.path().is_dir() { size(&entry.path()) } else { entry.metadata().map_or(0, |file| file.len()) }
    });
    sizes.sum()
}
