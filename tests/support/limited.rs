//! The stack's Prometheus, started by its own entry point, in a cgroup with the memory that the stack gives it. It needs root.

use std::env;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::blocking::Client;
use serde_json::Value;

use super::sidecar::Sidecar;
use super::tools;

pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A number from the environment.
pub fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

/// The stack's compose file.
pub fn compose() -> Value {
    let file = fs::read_to_string(Path::new(ROOT).join("docker-compose.yml")).expect("the stack");
    yaml_serde::from_str(&file).expect("YAML")
}

/// What the stack gives to Prometheus, in bytes.
pub fn mem_limit() -> u64 {
    let limit = compose()["services"]["prometheus"]["mem_limit"].as_str().expect("its limit").to_owned();
    limit.trim_end_matches('m').parse::<u64>().expect("MiB") << 20
}

/// A group of processes with a limit of memory, by either version of cgroups.
pub struct Group {
    pub folder: PathBuf,
    pub limit: u64,
    is_v1: bool,
}

impl Group {
    pub fn new(limit: u64) -> Self {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let is_v1 = v1.is_dir();
        let root = if is_v1 { v1 } else { Path::new("/sys/fs/cgroup") };
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = root.join(format!("baletheus-{}-{number}", std::process::id()));
        fs::create_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}: this needs root", folder.display()));
        let group = Group { folder, limit, is_v1 };
        let name = if is_v1 { "memory.limit_in_bytes" } else { "memory.max" };
        fs::write(group.folder.join(name), limit.to_string()).expect("a limit of memory");
        group
    }

    fn read(&self, v1: &str, v2: &str) -> u64 {
        let text = fs::read_to_string(self.folder.join(if self.is_v1 { v1 } else { v2 })).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }

    /// What the kernel cannot take back: without what it caches of files, in bytes.
    pub fn own(&self) -> u64 {
        let text = fs::read_to_string(self.folder.join("memory.stat")).unwrap_or_default();
        let name = if self.is_v1 { "rss " } else { "anon " };
        let value = text.lines().find_map(|line| line.strip_prefix(name));
        value.and_then(|value| value.parse().ok()).unwrap_or_default()
    }

    /// The most that was in use, with what the kernel caches of files, in bytes.
    pub fn peak(&self) -> u64 {
        self.read("memory.max_usage_in_bytes", "memory.peak")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What the entry point leaves in it ends within two seconds of Prometheus.
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.folder).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The configuration of the stack, with these addresses in the place of the names of its services.
pub fn configure(folder: &Path, sidecar: &Sidecar, others: &[(&str, &str)]) {
    let file = fs::read_to_string(Path::new(ROOT).join("prometheus.yml")).expect("the stack's configuration");
    let config = file
        .replace("/etc/prometheus/alerts", &format!("{ROOT}/alerts"))
        .replace("/targets/balena.json", sidecar.path("balena.json").to_str().expect("a path"));
    let config = others.iter().fold(config, |config, (name, address)| {
        assert!(config.contains(name), "{name} is in prometheus.yml");
        config.replace(name, address)
    });
    fs::create_dir_all(folder.join("etc"))
        .and_then(|()| fs::write(folder.join("etc/prometheus.yml"), config))
        .expect("written");
}

pub struct Prometheus {
    child: Child,
    client: Client,
    pub url: String,
}

impl Prometheus {
    /// With the configuration in `folder`, where its log and its samples are, and with these further arguments.
    pub fn start(folder: &Path, group: &Group, port: u16, args: &[String]) -> Self {
        let log = fs::File::options().create(true).append(true).open(folder.join("log")).expect("a log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ >\"$1/cgroup.procs\" && shift && exec sh \"$@\"", "sh"]);
        command.arg(&group.folder).arg(Path::new(ROOT).join("packaging/entrypoints/prometheus"));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}")).args(args);
        let prometheus = tools::prometheus(3);
        command.env("PROGRAM", prometheus.binary).env("PROMTOOL", prometheus.promtool);
        command.env("ETC", folder.join("etc")).env("TMPDIR", folder);
        // The entry point finds the limit of a container, which this is not.
        command.env("GOMEMLIMIT", (group.limit / 10 * 9).to_string()).env("DATA", folder.join("data"));
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log).spawn();
        let client = Client::builder().no_proxy().timeout(Duration::from_secs(120)).build().expect("a client");
        Self { child: child.expect("Prometheus"), client, url: format!("http://127.0.0.1:{port}") }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    pub fn end(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("its state")
    }

    pub fn text(&self, path: &str) -> Option<String> {
        self.client.get(format!("{}/{path}", self.url)).send().ok()?.text().ok()
    }

    pub fn get(&self, path: &str, query: &[(&str, &str)]) -> Option<Value> {
        let url = Url::parse_with_params(&format!("{}/api/v1/{path}", self.url), query).ok()?;
        serde_json::from_str(&self.client.get(url).send().ok()?.text().ok()?).ok()
    }

    pub fn value(&self, query: &str) -> f64 {
        let answer = self.get("query", &[("query", query)]).unwrap_or_default();
        answer["data"]["result"][0]["value"][1].as_str().and_then(|text| text.parse().ok()).unwrap_or(f64::NAN)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
