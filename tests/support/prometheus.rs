//! Real Prometheus servers and a real exporter for them to scrape.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::blocking::Client;
use serde_json::Value;
use tempfile::TempDir;

use super::tools;

const START: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);

/// The jobs of the project's `prometheus.yml` that scrape other services of the stack.
const STACK: [&str; 5] = ["baletheus", "baletheus-tunnel", "prometheus", "alertmanager", "grafana"];

/// A running server, which ends with the value.
pub struct Prometheus {
    server: Server,
    client: Client,
}

impl Prometheus {
    /// Starts Prometheus 2 or 3 with a configuration, whose relative paths count from its own folder.
    pub fn start(major: u8, config: &Path) -> Self {
        Self::start_with(major, config, &[])
    }

    /// The same, with further arguments.
    pub fn start_with(major: u8, config: &Path, args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(tools::prometheus(major).binary);
        command.arg("--config.file").arg(config).arg("--storage.tsdb.path").arg(folder.path().join("data")).args(args);
        let server = Server::start(command, folder);

        // reqwest asks for a TLS provider, even for http; a test that installed one already may keep it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
        let mut prometheus = Self { server, client };
        let deadline = Instant::now() + START;
        while !prometheus.is_ready() {
            prometheus.server.expect_alive();
            assert!(Instant::now() < deadline, "Prometheus is not ready:\n{}", prometheus.server.log_tail());
            thread::sleep(POLL);
        }
        prometheus
    }

    fn is_ready(&self) -> bool {
        let answer = self.client.get(format!("{}/-/ready", self.url())).send();
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// Whether it shows pages. Debian builds it without them.
    pub fn has_web_interface(&self) -> bool {
        let answer = self.client.get(format!("{}/targets", self.url())).send();
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.server.addr)
    }

    /// What `GET /api/v1/{path_and_query}` has as `data`.
    pub fn api(&self, path_and_query: &str) -> Value {
        self.get(&Url::parse(&format!("{}/api/v1/{path_and_query}", self.url())).unwrap())
    }

    /// An instant query for a vector: the labels and the value of each series.
    pub fn query(&self, promql: &str) -> Vec<(BTreeMap<String, String>, String)> {
        let url = format!("{}/api/v1/query", self.url());
        let data = self.get(&Url::parse_with_params(&url, [("query", promql)]).unwrap());
        assert_eq!(data["resultType"], "vector", "{promql}: {data}");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let series = |sample: &Value| {
            let labels = sample["metric"].as_object().unwrap();
            (labels.iter().map(|(name, value)| (name.clone(), text(value))).collect(), text(&sample["value"][1]))
        };
        data["result"].as_array().unwrap().iter().map(series).collect()
    }

    /// Without those of the stack itself, which the project's configuration has too.
    pub fn active_targets(&self) -> Vec<Value> {
        let mut targets = self.api("targets?state=active")["activeTargets"].as_array().unwrap().clone();
        targets.retain(|target| !STACK.contains(&target["scrapePool"].as_str().unwrap()));
        targets
    }

    /// Asks `f` until it has an answer; `what` is what it waits for.
    pub fn wait_until<T>(&self, what: &str, timeout: Duration, mut f: impl FnMut(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(answer) = f(self) {
                return answer;
            }
            if Instant::now() >= deadline {
                let (targets, log) = (self.active_targets(), self.server.log_tail());
                panic!("after {timeout:?} still not: {what}\ntargets: {targets:#?}\nlog:\n{log}");
            }
            thread::sleep(POLL);
        }
    }

    /// The sum of a metric of its own.
    pub fn own_metric(&self, name: &str) -> f64 {
        let answer = self.client.get(format!("{}/metrics", self.url())).send().and_then(|answer| answer.text());
        let text = answer.unwrap_or_else(|error| panic!("{error}\nlog:\n{}", self.server.log_tail()));
        let samples =
            text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        let values: Vec<f64> = samples.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        assert!(!values.is_empty(), "Prometheus has no metric {name}");
        values.iter().sum()
    }

    fn get(&self, url: &Url) -> Value {
        let answer = self.client.get(url.clone()).send().and_then(|answer| {
            let status = answer.status();
            Ok((status, answer.text()?))
        });
        let (status, body) = answer.unwrap_or_else(|error| panic!("{error}\nlog:\n{}", self.server.log_tail()));
        assert!(status.is_success(), "GET {url}: {status}: {body}");
        serde_json::from_str::<Value>(&body).unwrap_or_else(|error| panic!("GET {url}: {error}: {body}"))["data"].take()
    }
}

/// The project's `prometheus.yml` with another proxy, and with the target file beside it.
pub fn project_config(proxy_url: &str) -> String {
    let config = include_str!("../../prometheus.yml").to_owned();
    let parts = [("http://tunnel:9798", proxy_url), ("/targets/balena.json", "balena.json")];
    parts.into_iter().fold(config, |config, (stack, here)| {
        let parts: Vec<_> = config.split(stack).collect();
        assert_eq!(parts.len(), 2, "{stack} stands once in prometheus.yml");
        parts.join(here)
    })
}

/// The same with the jobs of this machine only: the devices, the sidecar and the tunnel. It resolves no name, asks for no rules
/// and sends no alerts.
pub fn loopback_config(tunnel: &str, status: &str) -> String {
    let config = project_config(tunnel);
    let (head, jobs) = config.split_once("\nscrape_configs:\n").expect("scrape configs");
    let (global, _) = head.split_once("\nrule_files:\n").expect("rules after the global settings");
    let kept = jobs.split_inclusive("\n\n").filter(|job| {
        let others = ["prometheus", "alertmanager", "grafana"];
        !others.iter().any(|name| job.contains(&format!("- job_name: {name}\n")))
    });
    let config = format!("{global}\nscrape_configs:\n{}", kept.collect::<String>());
    let host = |url: &str| url.trim_start_matches("http://").to_owned();
    let parts = [
        ("scrape_interval: 60s", "scrape_interval: 5s".to_owned()),
        ("baletheus:9797", host(status)),
        ("tunnel:9798", host(tunnel)),
    ];
    parts.into_iter().fold(config, |config, (stack, here)| {
        assert_eq!(config.matches(stack).count(), 1, "{stack}");
        config.replace(stack, &here)
    })
}

/// What `promtool check config` says of a configuration and of the target files it names.
pub fn promtool_check_config(major: u8, config: &Path) -> Result<String, String> {
    let output =
        Command::new(tools::prometheus(major).promtool).args(["check", "config"]).arg(config).output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    if output.status.success() { Ok(text) } else { Err(text) }
}

/// A running `node_exporter`, with a few collectors that are quick; it ends with the value.
pub struct NodeExporter(Server);

impl NodeExporter {
    pub fn start() -> Self {
        let mut command = Command::new(tools::node_exporter());
        command
            .args(["disable-defaults", "cpu", "loadavg", "meminfo", "uname"].map(|name| format!("--collector.{name}")));
        Self(Server::start(command, tempfile::tempdir().unwrap()))
    }

    /// With https, which offers HTTP/2, and with values that do not change.
    pub fn start_with_tls(certificate: &str, key: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let (certificate, key) = (file("cert.pem", certificate), file("key.pem", key));
        let config = format!("tls_server_config: {{cert_file: {certificate:?}, key_file: {key:?}}}\n");
        let mut command = Command::new(tools::node_exporter());
        command.args(["--web.disable-exporter-metrics", "--collector.disable-defaults", "--collector.uname"]);
        command.arg("--web.config.file").arg(file("web.yml", &config));
        Self(Server::start(command, folder))
    }

    pub fn addr(&self) -> SocketAddr {
        self.0.addr
    }
}

/// A program with Prometheus' web server in it, on a port that the system chose, and with its log in a folder of its own.
struct Server {
    child: Child,
    addr: SocketAddr,
    folder: TempDir,
}

impl Server {
    fn start(mut command: Command, folder: TempDir) -> Self {
        let log = File::create(folder.path().join("log")).unwrap();
        command.arg("--web.listen-address=127.0.0.1:0").stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // From here on, a panic ends the child as well.
        let mut server = Self { child, addr: SocketAddr::from(([127, 0, 0, 1], 0)), folder };
        let deadline = Instant::now() + START;
        loop {
            if let Some(addr) = listening_on(&server.log()) {
                server.addr = addr;
                return server;
            }
            server.expect_alive();
            assert!(Instant::now() < deadline, "{command:?} does not listen:\n{}", server.log_tail());
            thread::sleep(POLL);
        }
    }

    fn expect_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("a server ended with {status}:\n{}", self.log_tail());
        }
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.path().join("log")).unwrap()).into_owned()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Neither can fail in a way that matters here, and a second panic would abort the tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address in the log's `… msg="Listening on" … address=127.0.0.1:43211`, once that line is whole.
fn listening_on(log: &str) -> Option<SocketAddr> {
    let (lines, _) = log.rsplit_once('\n')?;
    let line = lines.lines().find(|line| line.contains(r#"msg="Listening on""#))?;
    line.split_whitespace().find_map(|word| word.strip_prefix("address="))?.parse().ok()
}
