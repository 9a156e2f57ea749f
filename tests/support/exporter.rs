//! The devices' side: a stand-in for balena's VPN proxy, and behind it an exporter on each port of each device that should
//! have one.

use super::cloud::{Cloud, KEY, Reply, Seen};
use super::vpn::{Device, Vpn};
use baletheus::discovery::exporter::{Exporter, parse_list};
use serde_json::Value;
use std::collections::HashMap;
use std::f64::consts::TAU;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Exporters with a real one behind them, by uuid.
type Backends = Arc<Mutex<HashMap<String, SocketAddr>>>;

/// Exporters of all devices of a simulated cloud; dropping it closes the listener of those that are simulated.
pub struct Exporters {
    /// A second cloud has all that a server needs, and each of its answers is intercepted.
    server: Cloud,
    backends: Backends,
    pub vpn: Vpn,
}

impl Exporters {
    pub fn start(cloud: &Arc<Cloud>) -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), cloud)
    }

    /// With the VPN proxy at this address.
    pub fn start_at(proxy: SocketAddr, cloud: &Arc<Cloud>) -> Self {
        let (server, backends) = (Cloud::start(Vec::new()), Backends::default());
        let simulated = server.url().strip_prefix("http://").and_then(|addr| addr.parse().ok()).expect("its address");
        let (known, start) = (cloud.clone(), SystemTime::now());
        server.intercept(move |seen, _| Some(reply(&known, start, seen)));
        let (known, behind) = (cloud.clone(), backends.clone());
        let vpn = Vpn::start_with_at(proxy, KEY, move |uuid| {
            let device = find(&known, uuid)?;
            let backend = behind.lock().expect("no thread has panicked in here").get(uuid).copied();
            let ports =
                exporters(&known, &device).into_iter().map(|exporter| (exporter.port, backend.unwrap_or(simulated)));
            Some(Device { offline: device["is_connected_to_vpn"] != true, silent: false, ports: ports.collect() })
        });
        Self { server, backends, vpn }
    }

    /// From now on a real exporter answers for this device.
    pub fn forward(&self, uuid: &str, backend: SocketAddr) {
        self.backends.lock().expect("no thread has panicked in here").insert(uuid.to_owned(), backend);
    }

    /// Forgets the scrapes so far. A program that runs long calls this now and then.
    pub fn clear_requests(&self) {
        self.server.clear_requests();
        self.vpn.clear_requests();
    }
}

fn find(cloud: &Cloud, uuid: &str) -> Option<Value> {
    cloud.change(|devices| devices.iter().find(|device| device["uuid"] == uuid).cloned())
}

/// The answer of a device. `Host` has its uuid.
fn reply(cloud: &Cloud, start: SystemTime, seen: &Seen) -> Reply {
    let (host, port) = seen.header("host").and_then(|host| host.split_once(':')).unwrap_or_default();
    let device = host.strip_suffix(".balena").and_then(|uuid| find(cloud, uuid)).unwrap_or_default();
    let exporters = exporters(cloud, &device).into_iter().filter(|exporter| exporter.port.to_string() == port);
    let mut exporters =
        exporters.filter(|exporter| exporter.path.as_deref().unwrap_or("/metrics") == seen.target.as_str());
    let Some(exporter) = exporters.next() else {
        return Reply::status(404, &[("Content-Type", "text/plain; charset=utf-8")], b"404 page not found\n");
    };
    let metrics = Metrics::new(&device, start);
    let body = if exporter.name.as_deref() == Some("app") { metrics.app() } else { metrics.node() };
    Reply::status(200, &[("Content-Type", TEXT_FORMAT)], body.as_bytes())
}

/// What the tags say, or else the labels of the services, or else a node_exporter on port 80.
fn exporters(cloud: &Cloud, device: &Value) -> Vec<Exporter> {
    let tags = |list: &Value| {
        let tags = list.as_array()?.iter().find(|tag| tag["tag_key"] == "prometheus.io/exporters");
        parse_list(tags?["value"].as_str()?).ok()
    };
    let fleet = || tags(&device["belongs_to__application"][0]["application_tag"]);
    let labelled =
        || Some(cloud.images_of(device).iter().filter_map(declared).collect()).filter(|all: &Vec<_>| !all.is_empty());
    let default = || Exporter::new(None, 80, None);
    tags(&device["device_tag"]).or_else(fleet).or_else(labelled).unwrap_or_else(|| vec![default()])
}

/// The exporter that the labels of a service declare.
fn declared(image: &Value) -> Option<Exporter> {
    let labels = image["image_label"].as_array()?;
    let label = |name: &str| {
        let found = labels.iter().find(|label| label["label_name"] == format!("prometheus.io.{name}"))?;
        found["value"].as_str().map(str::to_owned)
    };
    let service = image["image"][0]["is_a_build_of__service"][0]["service_name"].as_str().map(str::to_owned);
    Some(Exporter::new(label("job").or(service), label("port")?.parse().ok()?, label("path")))
}

/// What a device measures: waves around a level that each device has, and counters that are their integrals.
struct Metrics<'a> {
    device: &'a Value,
    /// Unix time.
    now: f64,
    uptime: f64,
    /// CPU time that each core has spent.
    busy: f64,
    /// The part of it that is being spent.
    usage: f64,
}

const CORES: u32 = 4;

impl<'a> Metrics<'a> {
    fn new(device: &'a Value, start: SystemTime) -> Self {
        let unix = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let now = unix(SystemTime::now());
        // Three numbers from 0 to 1 of its own.
        let digits =
            |at: usize| device["uuid"].as_str().and_then(|uuid| u16::from_str_radix(uuid.get(at..at + 4)?, 16).ok());
        let [level, tempo, age] = [0, 4, 8].map(|at| f64::from(digits(at).unwrap_or_default()) / f64::from(u16::MAX));
        let uptime = now - unix(start) + 86_400.0 * (1.0 + 40.0 * age);
        let (level, speed) = (0.05 + 0.4 * level, TAU / (120.0 + 600.0 * tempo));
        let wave = 0.8 * level;
        let usage = level + wave * (speed * uptime).sin();
        let busy = level * uptime + wave * (1.0 - (speed * uptime).cos()) / speed;
        Self { device, now, uptime, busy, usage }
    }

    fn text(&self, pointer: &str) -> &str {
        self.device.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// A number of the API in MiB, in bytes.
    fn bytes(&self, field: &str) -> f64 {
        self.device[field].as_f64().unwrap_or(1024.0) * 1_048_576.0
    }

    fn node(&self) -> String {
        let Self { now, uptime, busy, usage, .. } = *self;
        let mut page = Page::default();
        page.add("node_boot_time_seconds", "gauge", "Node boot time, in unixtime.", [("", (now - uptime).round())]);
        let shares = [("idle", uptime - busy), ("iowait", busy * 0.05), ("system", busy * 0.25), ("user", busy * 0.7)];
        let cores = (0..CORES).flat_map(|core| {
            shares.map(|(mode, seconds)| {
                (format!(r#"{{cpu="{core}",mode="{mode}"}}"#), (seconds * 100.0).round() / 100.0)
            })
        });
        page.add("node_cpu_seconds_total", "counter", "Seconds the CPUs spent in each mode.", cores);
        let data = r#"{device="/dev/mmcblk0p6",fstype="ext4",mountpoint="/mnt/data"}"#;
        let size = self.bytes("storage_total");
        let avail = size - self.bytes("storage_usage");
        page.add(
            "node_filesystem_avail_bytes",
            "gauge",
            "Filesystem space available to non-root users.",
            [(data, avail)],
        );
        page.add("node_filesystem_readonly", "gauge", "Filesystem read-only status.", [(data, 0.0)]);
        page.add("node_filesystem_size_bytes", "gauge", "Filesystem size in bytes.", [(data, size)]);
        for (name, minutes) in [("node_load1", 1.0), ("node_load5", 5.0), ("node_load15", 15.0)] {
            // The longer the mean, the flatter the wave.
            let load = f64::from(CORES) * (busy / uptime + (usage - busy / uptime) / minutes);
            page.add(name, "gauge", &format!("{minutes}m load average."), [("", (load * 100.0).round() / 100.0)]);
        }
        let total = self.bytes("memory_total");
        let free = (total * (0.85 - 0.6 * usage)).round();
        page.add(
            "node_memory_MemAvailable_bytes",
            "gauge",
            "Memory information field MemAvailable_bytes.",
            [("", free)],
        );
        page.add("node_memory_MemTotal_bytes", "gauge", "Memory information field MemTotal_bytes.", [("", total)]);
        let swap = (total / 4.0).round();
        for (name, value) in [("SwapFree", swap * (1.0 - 0.3 * usage)), ("SwapTotal", swap)] {
            let (name, help) = (format!("node_memory_{name}_bytes"), format!("Memory information field {name}_bytes."));
            page.add(&name, "gauge", &help, [("", value.round())]);
        }
        for (name, share) in [("cpu", 0.2), ("io", 0.05), ("memory", 0.01)] {
            let name = format!("node_pressure_{name}_waiting_seconds_total");
            page.add(&name, "counter", "Seconds that processes have waited.", [("", (busy * share).round())]);
        }
        let eth0 = r#"{device="eth0"}"#;
        for (way, rate) in [("receive", 18_000.0), ("transmit", 7_000.0)] {
            let (name, help) =
                (format!("node_network_{way}_bytes_total"), format!("Network device statistic {way}_bytes."));
            page.add(&name, "counter", &help, [(eth0, (busy * rate).round())]);
        }
        let cpu = r#"{type="cpu-thermal",zone="0"}"#;
        page.add(
            "node_thermal_zone_temp",
            "gauge",
            "Zone temperature in Celsius",
            [(cpu, (38.0 + 45.0 * usage).round())],
        );
        if self.text("/is_of__device_type/0/slug").starts_with("raspberrypi") {
            // node_exporter takes the alarm for a voltage in thousandths.
            let undervolted = if self.device["is_undervolted"] == true { 0.001 } else { 0.0 };
            let volts = r#"{chip="rpi_volt",sensor="in0"}"#;
            let alarm = "Hardware monitor for voltage (lcrit_alarm)";
            page.add("node_hwmon_in_lcrit_alarm_volts", "gauge", alarm, [(volts, undervolted)]);
            let degrees = r#"{chip="thermal_thermal_zone0",sensor="temp1"}"#;
            let heat = (38.0 + 45.0 * usage).round();
            page.add("node_hwmon_temp_celsius", "gauge", "Hardware monitor for temperature (input)", [(degrees, heat)]);
        }
        page.add("node_time_seconds", "gauge", "System time in seconds since epoch (1970).", [("", now)]);
        let machine = match self.text("/is_of__device_type/0/slug") {
            "raspberrypi3" => "armv7l",
            "generic-amd64" => "x86_64",
            _ => "aarch64",
        };
        let uname = format!(
            r##"{{domainname="(none)",machine="{machine}",nodename="{:.7}",release="6.6.74",sysname="Linux",version="#1 SMP PREEMPT"}}"##,
            self.text("/uuid")
        );
        page.add(
            "node_uname_info",
            "gauge",
            "Labeled system information as provided by the uname system call.",
            [(uname, 1.0)],
        );
        page.0
    }

    fn app(&self) -> String {
        let mut page = Page::default();
        let requests =
            [(r#"{code="200"}"#, (self.busy * 12.0).round()), (r#"{code="500"}"#, (self.busy * 0.1).round())];
        page.add("app_requests_total", "counter", "Requests answered.", requests);
        page.add("app_queue_length", "gauge", "Jobs that wait.", [("", (self.usage * 40.0).round())]);
        page.0
    }
}

/// Metrics in Prometheus' text format.
#[derive(Default)]
struct Page(String);

impl Page {
    fn add<L: AsRef<str>>(&mut self, name: &str, kind: &str, help: &str, samples: impl IntoIterator<Item = (L, f64)>) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{} {value}", labels.as_ref());
        }
    }
}
