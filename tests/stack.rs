//! The stack as a user has it: the real images and the real compose file in real containers, with a simulated balenaCloud and
//! VPN on this side of Docker's bridge. `scripts/check/stack` brings all that this needs, and takes it away again.

pub mod support {
    pub mod cloud;
    pub mod fleet;
    pub mod odata;
    pub mod recording;
    pub mod tools;
    pub mod vpn;
}

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

use reqwest::blocking::Client;
use serde_json::{Value, json};
use support::cloud::{Cloud, KEY};
use support::fleet::{declare_exporters, demo_fleet};
use support::tools;
use support::vpn::Vpn;
use tempfile::TempDir;

const SERVICES: [&str; 5] = ["baletheus", "tunnel", "prometheus", "alertmanager", "grafana"];
const PROMETHEUS: &str = "http://127.0.0.1:9090";
/// More than two scrape intervals.
const PATIENCE: Duration = Duration::from_secs(150);
/// With all that could break out of a YAML string or a shell word.
const PASSWORD: &str = r#"remote-write-"secret"-'$(id)'-\n: #9f41"#;
const STACK_NAME: &str = "it's the \"test\" $HOME stack";
/// What a memory of 1 GiB leaves beside balenaOS and the stack's own exporter, which has 32 MiB.
const MEMORY: u64 = 704 << 20;
const IMAGE_SIZE: u64 = 16 << 20;

struct Stack {
    compose: PathBuf,
    override_file: PathBuf,
    vpn: Vpn,
    /// Bodies that came to the webhook.
    alerts: Arc<Mutex<Vec<String>>>,
    client: Client,
    online: usize,
    _cloud: Cloud,
    _folder: TempDir,
}

/// Tests that restart services have it for themselves.
static STACK: LazyLock<RwLock<Stack>> = LazyLock::new(|| RwLock::new(Stack::start()));

fn stack() -> RwLockReadGuard<'static, Stack> {
    STACK.read().unwrap_or_else(PoisonError::into_inner)
}

fn stack_alone() -> RwLockWriteGuard<'static, Stack> {
    STACK.write().unwrap_or_else(PoisonError::into_inner)
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Its standard output.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [out, error] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    if output.status.success() { Ok(out) } else { Err(format!("{command:?}: {}\n{out}{error}", output.status)) }
}

fn docker<'a>(args: impl IntoIterator<Item = &'a str>) -> String {
    run(Command::new("docker").args(args)).unwrap_or_else(|error| panic!("{error}"))
}

/// The last lines of what a container has said, or all of it.
fn logs(container: &str, tail: &str) -> String {
    let script = "docker logs --tail \"$1\" \"$0\" 2>&1";
    run(Command::new("sh").args(["-c", script, container, tail])).unwrap_or_else(|error| panic!("{error}"))
}

fn wait_for<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = f() {
            return answer;
        }
        assert!(Instant::now() < deadline, "after {PATIENCE:?} still not: {what}");
        thread::sleep(Duration::from_millis(200));
    }
}

impl Stack {
    fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        assert!(std::env::var_os("COMPOSE_PROJECT_NAME").is_some(), "run scripts/check/stack, which builds the images");
        let here = address_on_bridge();
        let fleet = demo_fleet();
        let uuids: Vec<_> = fleet.iter().map(|device| device["uuid"].as_str().unwrap().to_owned()).collect();
        let online = fleet.iter().map(|device| device["is_connected_to_vpn"] == true).collect::<Vec<_>>();
        let scraped = |device: &Value| {
            let off = |tag: &Value| tag["tag_key"] == "prometheus.io/scrape" && tag["value"] == "false";
            !device["device_tag"].as_array().unwrap().iter().any(off)
        };
        let expected = fleet.iter().filter(|device| device["is_connected_to_vpn"] == true && scraped(device)).count();
        let cloud = Cloud::start_at((here, 0).into(), fleet);
        declare_exporters(&cloud);
        let vpn = Vpn::start_at((here, 0).into(), KEY);
        let alerts = Arc::default();
        let webhook = listen((here, 0).into(), Arc::clone(&alerts));

        let folder = tempfile::tempdir().unwrap();
        let override_file = folder.path().join("override.yml");
        let quick = json!({"interval": "1s"});
        let mut services = json!({
            // A device without a release names its exporter by its own tag.
            "baletheus": {"environment": {
                "API_KEY": KEY, "BALENA_API_URL": cloud.url(), "REFRESH_RATE": "2s", "OWN_TAGS": "all",
            }},
            "tunnel": {"environment": {"API_KEY": KEY, "TUNNEL_URL": vpn.url()}},
            "prometheus": {"environment": {
                // As a variable of the whole fleet would be.
                "API_KEY": KEY,
                "STACK_NAME": STACK_NAME.replace('$', "$$"),
                "REMOTE_WRITE_URL": "http://victoria-metrics:8428/api/v1/write",
                "REMOTE_WRITE_USERNAME": "stack",
                "REMOTE_WRITE_PASSWORD": PASSWORD.replace('$', "$$"),
            }},
            "alertmanager": {"environment": {"API_KEY": KEY, "ALERT_WEBHOOK_URL": format!("http://{webhook}/hook")}},
            "grafana": {"environment": {"API_KEY": KEY}},
        });
        for service in SERVICES {
            services[service]["healthcheck"] = quick.clone();
        }
        services["node-exporter"] = json!({"healthcheck": quick});
        // Not of the stack: a device's exporter, and a backend to write to.
        services["device"] = json!({"image": "prom/node-exporter:v1.12.1"});
        services["victoria-metrics"] = json!({
            "image": "baletheus-test/victoria-metrics",
            "command": ["-httpAuth.username=stack", format!("-httpAuth.password={}", PASSWORD.replace('$', "$$"))],
        });
        fs::write(&override_file, json!({"services": services}).to_string()).unwrap();

        let client = Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
        let stack = Self {
            compose: tools::docker_compose(),
            override_file,
            vpn,
            alerts,
            client,
            online: expected,
            _cloud: cloud,
            _folder: folder,
        };
        stack.compose(&["up", "--detach", "--no-build"]);
        let exporter = SocketAddr::new(stack.address("device"), 9100);
        for (uuid, online) in uuids.iter().zip(online) {
            stack.vpn.device(uuid, |device| {
                device.offline = !online;
                device.ports.insert(80, exporter);
            });
        }
        stack
    }

    fn compose(&self, args: &[&str]) -> String {
        let mut command = Command::new(&self.compose);
        command.arg("--file").arg(repository().join("docker-compose.yml")).arg("--file").arg(&self.override_file);
        run(command.args(args)).unwrap_or_else(|error| panic!("{error}"))
    }

    fn container(&self, service: &str) -> String {
        self.compose(&["ps", "--all", "--quiet", service]).trim().to_owned()
    }

    fn inspect(&self, service: &str) -> Value {
        serde_json::from_str::<Value>(&docker(["inspect", &self.container(service)])).unwrap()[0].take()
    }

    fn address(&self, service: &str) -> IpAddr {
        let networks = self.inspect(service)["NetworkSettings"]["Networks"].take();
        let network = networks.as_object().unwrap().values().next().unwrap();
        network["IPAddress"].as_str().unwrap().parse().expect("an address")
    }

    /// What the main process of a service has in a file of /proc.
    fn proc(&self, service: &str, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.inspect(service)["State"]["Pid"]);
        String::from_utf8_lossy(&fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))).into_owned()
    }

    /// Runs it in the container, as the user that the service has.
    fn exec(&self, service: &str, args: &[&str]) -> Result<String, String> {
        run(Command::new("docker").args(["exec", &self.container(service)]).args(args))
    }

    fn get(&self, url: &str) -> Result<String, String> {
        let answer = self.client.get(url).send().and_then(|answer| answer.error_for_status()?.text());
        answer.map_err(|error| format!("{error:?}"))
    }

    fn alertmanager(&self) -> String {
        format!("http://{}:9093", self.address("alertmanager"))
    }

    /// Sends alerts to Alertmanager as Prometheus does.
    fn raise(&self, alerts: &Value) {
        let url = format!("{}/api/v2/alerts", self.alertmanager());
        wait_for("Alertmanager takes alerts", || {
            let post = self.client.post(&url).header("Content-Type", "application/json").body(alerts.to_string());
            post.send().is_ok_and(|answer| answer.status().is_success()).then_some(())
        });
    }

    fn prometheus(&self, path: &str) -> Option<Value> {
        let answer = self.get(&format!("{PROMETHEUS}/api/v1/{path}")).ok()?;
        Some(serde_json::from_str::<Value>(&answer).ok()?["data"].take())
    }

    fn wait_until_healthy(&self, services: &[&str]) {
        for service in services {
            let health = || self.inspect(service)["State"]["Health"]["Status"].as_str().map(str::to_owned);
            let healthy = || health().filter(|health| health == "healthy");
            let deadline = Instant::now() + PATIENCE;
            while healthy().is_none() {
                let log = || logs(&self.container(service), "20");
                assert!(Instant::now() < deadline, "{service} is {:?}, its log:\n{}", health(), log());
                thread::sleep(Duration::from_millis(200));
            }
        }
    }

    /// All devices' targets, once they are as many as they should be, and those up that are online.
    fn wait_for_targets(&self) {
        let mut seen = String::new();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let targets = self.prometheus("targets?state=active&scrapePool=balena").unwrap_or_default();
            let targets = targets["activeTargets"].as_array().cloned().unwrap_or_default();
            let node = targets.iter().filter(|target| target["labels"]["job"] == "node");
            let health = |wanted: &str| node.clone().filter(|target| target["health"] == wanted).count();
            if (targets.len(), health("up"), health("unknown")) == (25, self.online, 0) {
                return;
            }
            seen = format!("{targets:#?}");
            thread::sleep(Duration::from_millis(500));
        }
        panic!("not 25 targets, {} of them up: {seen}", self.online);
    }
}

/// What containers can reach this side by. Docker tells the subnet, and the routes the rest; nothing is sent.
fn address_on_bridge() -> IpAddr {
    let subnet = docker(["network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}"]);
    let base: Ipv4Addr = subnet.split('/').next().unwrap().parse().expect("a subnet");
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    socket.connect((Ipv4Addr::from_bits(base.to_bits() | 2), 9)).expect("a route to Docker's bridge");
    socket.local_addr().unwrap().ip()
}

/// A webhook: takes any POST, and keeps its body.
fn listen(addr: SocketAddr, bodies: Arc<Mutex<Vec<String>>>) -> SocketAddr {
    let listener = TcpListener::bind(addr).expect("a free port");
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream);
            let mut length = 0;
            for line in reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty()) {
                if let Some((name, value)) = line.split_once(':')
                    && name.eq_ignore_ascii_case("content-length")
                {
                    length = value.trim().parse().unwrap_or(0);
                }
            }
            let mut body = vec![0; length];
            if reader.read_exact(&mut body).is_ok() {
                bodies.lock().unwrap().push(String::from_utf8_lossy(&body).into_owned());
                let _ =
                    reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        }
    });
    addr
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn every_service_gets_healthy() {
    stack().wait_until_healthy(&SERVICES);
    stack().wait_until_healthy(&["node-exporter"]);
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn targets_are_up_through_the_tunnel() {
    let stack = stack();
    stack.wait_for_targets();
    assert!(stack.vpn.requests().iter().all(|head| head.starts_with("CONNECT ")), "{:#?}", stack.vpn.requests());
    // What the stack scrapes of itself. Grafana's stand-in has no metrics.
    for job in ["baletheus", "baletheus-tunnel", "prometheus", "alertmanager"] {
        wait_for(&format!("{job} is up"), || {
            let data = stack.prometheus(&format!("query?query=up%7Bjob%3D%22{job}%22%7D"))?;
            (data["result"][0]["value"][1] == "1").then_some(())
        });
    }
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn all_alerts_are_loaded() {
    let stack = stack();
    let mut files = BTreeSet::new();
    for file in fs::read_dir(repository().join("alerts")).unwrap().map(|entry| entry.unwrap().path()) {
        if file.extension().is_some_and(|extension| extension == "yml") {
            let text = fs::read_to_string(&file).unwrap();
            let names = text.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
            files.extend(names.map(str::to_owned));
        }
    }
    assert!(!files.is_empty(), "alerts/ has no alerts");
    let rules = wait_for("rules", || stack.prometheus("rules?type=alert"));
    let groups = rules["groups"].as_array().unwrap().iter();
    let rules: Vec<_> = groups.flat_map(|group| group["rules"].as_array().unwrap()).collect();
    let loaded: BTreeSet<_> = rules.iter().map(|rule| rule["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(loaded, files);
    assert!(rules.iter().all(|rule| rule["health"] != "err"), "{rules:#?}");
    let url = wait_for("Prometheus knows Alertmanager", || {
        Some(stack.prometheus("alertmanagers")?["activeAlertmanagers"][0]["url"].as_str()?.to_owned())
    });
    assert_eq!(url, "http://alertmanager:9093/api/v2/alerts");
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn an_alert_reaches_the_webhook() {
    let stack = stack();
    stack.raise(&json!([{"labels": {"alertname": "TestStack", "fleet": "polar-foods/cold-chain"}}]));
    let body = wait_for("the webhook has it", || {
        stack.alerts.lock().unwrap().iter().find(|body| body.contains("TestStack")).cloned()
    });
    let message: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(message["groupLabels"], json!({"alertname": "TestStack", "fleet": "polar-foods/cold-chain"}));
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn samples_reach_the_backend() {
    let stack = stack();
    let query = format!("http://{}:8428/api/v1/query", stack.address("victoria-metrics"));
    let ask = |promql: &str, password: &str| {
        let url = reqwest::Url::parse_with_params(&query, [("query", promql)]).unwrap();
        stack.client.get(url).basic_auth("stack", Some(password)).send()
    };
    let series = wait_for("the backend has the devices' samples", || {
        let answer = ask("count by (stack) (up{job=\"node\"})", PASSWORD).ok()?.text().ok()?;
        Some(serde_json::from_str::<Value>(&answer).ok()?["data"]["result"].take()).filter(|found| found != &json!([]))
    });
    assert_eq!(series[0]["metric"], json!({"stack": STACK_NAME}));
    assert_eq!(ask("up", "wrong").unwrap().status(), 401, "the backend asks for the password");
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn only_the_sidecar_writes_targets() {
    let stack = stack();
    let list = wait_for("a target file", || stack.exec("prometheus", &["cat", "/targets/balena.json"]).ok());
    assert_eq!(serde_json::from_str::<Value>(&list).unwrap().as_array().unwrap().len(), 25);
    let refused = stack.exec("prometheus", &["sh", "-c", "echo > /targets/balena.json"]).unwrap_err();
    assert!(refused.contains("Read-only file system"), "{refused}");
    // As seen from the host.
    let mounts = stack.inspect("baletheus")["Mounts"].take();
    let volume = Path::new(mounts[0]["Source"].as_str().unwrap());
    let owner = |path: &Path| {
        let metadata = fs::metadata(path).unwrap();
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
    };
    assert_eq!(owner(volume), (65532, 65532, 0o755));
    assert_eq!(owner(&volume.join("balena.json")), (65532, 65532, 0o644));
    let writes = |service| {
        stack.inspect(service)["Mounts"]
            .as_array()
            .unwrap()
            .iter()
            .any(|mount| mount["Destination"] == "/targets" && mount["RW"] == true)
    };
    assert_eq!(SERVICES.into_iter().filter(|service| writes(service)).collect::<Vec<_>>(), ["baletheus"]);
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn services_have_no_more_than_they_need() {
    let stack = stack();
    let (mut published, mut memory) = (BTreeSet::new(), 0);
    for service in SERVICES {
        let container = stack.inspect(service);
        // What the kernel says of the process.
        let status = stack.proc(service, "status");
        let status: BTreeMap<_, _> = status.lines().filter_map(|line| line.split_once(":\t")).collect();
        let uid = match service {
            "baletheus" | "tunnel" => "65532",
            "grafana" => "472",
            _ => "65534",
        };
        assert_eq!(status["Uid"], [uid; 4].join("\t"), "{service}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status[set], "0000000000000000", "{set} of {service}");
        }
        assert_eq!((status["NoNewPrivs"], status["Seccomp"]), ("1", "2"), "{service}");
        let mounts = stack.proc(service, "mountinfo");
        let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
        assert!(root.split(' ').nth(5).unwrap().split(',').any(|option| option == "ro"), "{service}: {root}");
        let binds = container["Mounts"].as_array().unwrap().iter().filter(|mount| mount["Type"] != "volume");
        assert_eq!(binds.count(), 0, "{service}");
        assert_eq!(container["HostConfig"]["Privileged"], false, "{service}");
        assert_eq!(container["HostConfig"]["RestartPolicy"]["Name"], "unless-stopped", "{service}");
        memory += container["HostConfig"]["Memory"].as_u64().filter(|memory| *memory > 0).expect("a limit");
        for (inside, outside) in container["NetworkSettings"]["Ports"].as_object().unwrap() {
            for port in outside.as_array().into_iter().flatten() {
                let at = |name: &str| port[name].as_str().unwrap().to_owned();
                published.insert(format!("{service} {inside} {} {}", at("HostIp"), at("HostPort")));
            }
        }
    }
    assert!(memory <= MEMORY, "{memory}");
    published.remove("grafana 3000/tcp :: 80"); // where the host has IPv6
    let expected = ["grafana 3000/tcp 0.0.0.0 80", "prometheus 9090/tcp 127.0.0.1 9090"].map(str::to_owned);
    assert_eq!(published, expected.into());
    let size = docker(["inspect", "--format", "{{.Size}}", stack.inspect("baletheus")["Image"].as_str().unwrap()]);
    assert!(size.trim().parse::<u64>().unwrap() <= IMAGE_SIZE, "{size}");
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn secrets_stay_where_they_belong() {
    let stack = stack();
    stack.wait_until_healthy(&SERVICES);
    for service in SERVICES {
        let container = stack.container(service);
        let image = stack.inspect(service)["Image"].as_str().unwrap().to_owned();
        let mut places = vec![
            stack.proc(service, "cmdline"),
            logs(&container, "all"),
            docker(["history", "--no-trunc", &image]),
            docker(["inspect", &image]),
        ];
        // Even where a variable of the whole fleet gives it to them.
        if !["baletheus", "tunnel"].contains(&service) {
            places.push(stack.proc(service, "environ"));
        }
        for (place, secret) in places.iter().flat_map(|place| [(place, KEY), (place, PASSWORD)]) {
            assert!(!place.contains(secret), "{service}: {place}");
        }
    }
    let config = wait_for("the configuration", || stack.prometheus("status/config"));
    let config = config["yaml"].as_str().unwrap();
    assert!(config.contains("password_file: /tmp/remote-write-password") && !config.contains("secret"), "{config}");
    for (service, file) in [("prometheus", "remote-write-password"), ("alertmanager", "webhook-url")] {
        let root = PathBuf::from(format!("/proc/{}/root/tmp", stack.inspect(service)["State"]["Pid"]));
        assert_eq!(fs::metadata(root.join(file)).unwrap().mode() & 0o7777, 0o600, "{file}");
    }
}

/// Grafana itself is in no registry that this is tested with: what it is given can be looked at.
#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn grafana_is_given_what_it_needs() {
    let stack = stack();
    let mut dashboards = 0;
    let mut folders = vec![PathBuf::from("grafana"), PathBuf::from("dashboards")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(repository().join(&folder)).unwrap().map(Result::unwrap) {
            let path = folder.join(entry.file_name());
            if entry.path().is_dir() {
                folders.push(path);
                continue;
            }
            let inside = match path.strip_prefix("grafana") {
                Ok(path) => Path::new("/etc/grafana").join(path),
                Err(_) => Path::new("/etc/grafana").join(&path),
            };
            dashboards += usize::from(path.starts_with("dashboards"));
            let text = stack.exec("grafana", &["cat", inside.to_str().unwrap()]).unwrap();
            assert_eq!(text, fs::read_to_string(entry.path()).unwrap(), "{}", path.display());
        }
    }
    assert!(dashboards > 0, "no dashboards");
    stack.exec("grafana", &["test", "-r", "/etc/grafana/dashboards/fleet-overview.json"]).expect("the home dashboard");
    stack.exec("grafana", &["sh", "-c", "echo > /var/lib/grafana/grafana.db"]).expect("a place for the database");
    let data = stack.proc("grafana", "mountinfo");
    let data = data.lines().find(|line| line.split(' ').nth(4) == Some("/var/lib/grafana")).expect("a mount");
    assert!(data.contains(" - tmpfs "), "{data}");
    let answer = stack.get("http://127.0.0.1:80/api/health").unwrap();
    assert!(answer.contains("ok"), "{answer}");
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn the_example_for_devices_answers_without_any_capability() {
    let stack = stack_alone();
    let folder = tempfile::tempdir().unwrap();
    // As balena's label does.
    let mounts = json!({"services": {"node-exporter": {
        "volumes": ["/sys:/sys:ro"],
        "healthcheck": {"interval": "1s"},
    }}});
    fs::write(folder.path().join("override.yml"), mounts.to_string()).unwrap();
    let project = format!("{}-device", std::env::var("COMPOSE_PROJECT_NAME").unwrap());
    let compose = |args: &[&str]| {
        let mut command = Command::new(&stack.compose);
        command.args(["--project-name", &project, "--file"]);
        command.arg(repository().join("examples/thingy/docker-compose.yml"));
        run(command.arg("--file").arg(folder.path().join("override.yml")).args(args)).unwrap()
    };
    // On a device there is one of them: both take port 9100 of the host.
    stack.compose(&["stop", "node-exporter"]);
    compose(&["up", "--detach"]);
    let container = compose(&["ps", "--quiet"]).trim().to_owned();
    let inspect = |what: &str| docker(["inspect", "--format", what, &container]).trim().to_owned();
    wait_for("it is healthy", || (inspect("{{.State.Health.Status}}") == "healthy").then_some(()));
    let page = stack.get("http://127.0.0.1:9100/metrics").unwrap();
    for sample in [
        "node_boot_time_seconds ",
        "node_cpu_seconds_total{",
        "node_filesystem_size_bytes{device=",
        "node_network_address_info{",
        "node_load1 ",
        "node_memory_MemAvailable_bytes ",
        "node_network_receive_bytes_total{device=",
    ] {
        assert!(page.lines().any(|line| line.starts_with(sample)), "no {sample} in\n{page}");
    }
    let status = fs::read_to_string(format!("/proc/{}/status", inspect("{{.State.Pid}}"))).unwrap();
    assert!(status.contains("CapEff:\t0000000000000000\n"), "{status}");
    assert!(page.contains(r#",mountpoint="/data"} "#), "the named volume is measured\n{page}");
    compose(&["down", "--volumes", "--timeout", "5"]);
    stack.compose(&["start", "node-exporter"]);
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn every_service_survives_a_restart() {
    let stack = stack_alone();
    stack.wait_until_healthy(&SERVICES);
    for service in SERVICES {
        let started = |container: Value| container["State"]["StartedAt"].as_str().unwrap().to_owned();
        let before = started(stack.inspect(service));
        stack.compose(&["restart", service]);
        assert_ne!(started(stack.inspect(service)), before);
        stack.wait_until_healthy(&[service]);
    }
    stack.wait_for_targets();
    let query = "query?query=count_over_time(up%7Bjob%3D%22prometheus%22%7D%5B1h%5D)";
    wait_for("Prometheus has what it had", || {
        let data = stack.prometheus(query)?;
        let samples: u32 = data["result"][0]["value"][1].as_str()?.parse().ok()?;
        (samples >= 2).then_some(())
    });
}

#[test]
#[ignore = "needs Docker: scripts/check/stack"]
fn every_service_stops_in_time() {
    let stack = stack_alone();
    stack.wait_until_healthy(&SERVICES);
    for service in SERVICES {
        stack.compose(&["stop", service]);
        let state = stack.inspect(service)["State"].take();
        // 137 would be SIGKILL, which Docker sends after ten seconds.
        assert!([0, 143].contains(&state["ExitCode"].as_i64().unwrap()), "{service}: {state}");
    }
    stack.compose(&["start"]);
    stack.wait_until_healthy(&SERVICES);
}
