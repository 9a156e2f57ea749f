//! What the sidecar tells over HTTP, of itself and of each device.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::binary::{self, BINARY};
use crate::support::cloud::{Cloud, Reply, Step, recorded_devices};
use crate::support::fleet::{demo_fleet, find, set_tag};
use crate::support::sidecar::{PATIENCE, Running, Sidecar, finish};
use crate::support::tools;
use serde_json::{Value, json};

fn sidecar(cloud: &Cloud) -> Sidecar {
    binary::sidecar(cloud)
        .env("LISTEN_ADDRESS", "127.0.0.1:0")
        .env("DEVICE_REFRESH_RATE", "1s")
        .env("EXPORTERS", "node:80")
}

/// A sidecar that listens, and where.
struct Status {
    running: Running,
    address: SocketAddr,
}

impl Status {
    fn start(sidecar: &Sidecar) -> Self {
        let running = sidecar.start();
        let line = running.wait_for("status on http://");
        let address = line.rsplit_once("http://").unwrap().1.parse().expect("an address");
        Status { running, address }
    }

    /// Status, head and body.
    fn get(&self, path: &str) -> (u16, String, Vec<u8>) {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"))
    }

    fn send(&self, request: &str) -> (u16, String, Vec<u8>) {
        let mut stream = TcpStream::connect(self.address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("it answers and closes");
        let head = answer.windows(4).position(|end| end == b"\r\n\r\n").expect("a head");
        let body = answer.split_off(head + 4);
        let head = String::from_utf8(answer).expect("text").to_lowercase();
        (head.split(' ').nth(1).unwrap().parse().expect("a status"), head, body)
    }

    fn text(&self, path: &str) -> String {
        let (status, head, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {head}");
        String::from_utf8(body).expect("UTF-8")
    }

    /// Samples of `/metrics`, by name and labels.
    fn metrics(&self) -> BTreeMap<String, f64> {
        let sample = |line: &str| line.rsplit_once(' ').map(|(name, value)| (name.to_owned(), value.parse().unwrap()));
        self.text("/metrics").lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
    }

    /// Waits until the metrics are such.
    fn wait_until(&self, what: &str, is_so: impl Fn(&BTreeMap<String, f64>) -> bool) -> BTreeMap<String, f64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let metrics = self.metrics();
            if is_so(&metrics) {
                return metrics;
            }
            assert!(Instant::now() < deadline, "{what}: {metrics:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn the_sidecar_tells_how_it_is() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    let metrics = status.wait_until("a 304", |metrics| metrics["baletheus_api_requests_total{code=\"304\"}"] > 0.0);
    assert_eq!(metrics["baletheus_build_info{version=\"0.1.0\"}"], 1.0);
    assert_eq!(metrics["baletheus_devices"], 25.0);
    assert_eq!(metrics["baletheus_targets"], 24.0, "one is left out, and gw-oslo may not name a second exporter");
    assert_eq!(metrics["baletheus_devices_left_out{reason=\"switched_off\"}"], 1.0);
    assert_eq!(metrics["baletheus_file_writes_total"], 1.0);
    assert_eq!(metrics["baletheus_file_write_failures_total"], 0.0);
    assert!(metrics["baletheus_refreshes_total"] >= 1.0);
    assert_eq!(metrics["baletheus_refresh_duration_seconds_count"], metrics["baletheus_refreshes_total"]);
    assert!(metrics["baletheus_api_requests_total{code=\"200\"}"] >= 2.0, "whoami, discovery, vitals: {metrics:#?}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now - 120.0..=now).contains(&metrics["baletheus_last_refresh_timestamp_seconds"]));
    assert!(metrics["process_resident_memory_bytes"] > 1e6 && metrics["process_open_fds"] > 3.0);

    cloud.intercept(|seen, _| seen.target.contains("$expand=is_of").then(|| Reply::status(503, &[], b"")));
    let failed = "baletheus_refresh_failures_total{reason=\"server_error\"}";
    status.wait_until("a failure", |metrics| metrics.get(failed).is_some_and(|count| *count >= 1.0));
    assert!(status.text("/").contains("<title>baletheus: failing</title>"));
    assert_eq!(status.get("/-/ready").0, 200, "the list still stands");
    cloud.heal();

    // A file that cannot be written is told of as well.
    fs::remove_file(sidecar.path("balena.json")).unwrap();
    fs::create_dir(sidecar.path("balena.json")).unwrap();
    status.running.signal("HUP");
    status.wait_until("a write failure", |metrics| metrics["baletheus_file_write_failures_total"] >= 1.0);
}

#[test]
fn every_device_is_there_without_an_exporter_and_goes_with_the_fleet() {
    let cloud = Cloud::start(demo_fleet());
    cloud.change(|devices| {
        let lamp = find(devices, "lamp-0001");
        lamp["should_be_running__release"] = json!([{ "id": 1, "commit": "0", "raw_version": "9.9.9" }]);
        (lamp["memory_usage"], lamp["cpu_temp"]) = (Value::Null, Value::Null);
        find(devices, "lamp-0002")["is_undervolted"] = json!(true);
        // one that cannot be read costs its own vitals only
        find(devices, "lamp-0003")["memory_usage"] = json!("much");
    });
    let uuid = |name: &str| cloud.change(|devices| find(devices, name)["uuid"].as_str().unwrap().to_owned());
    let (fridge, offline, lamp, low) = (uuid("fridge-01"), uuid("fridge-03"), uuid("lamp-0001"), uuid("lamp-0002"));
    let sidecar = sidecar(&cloud).env("DEVICE_METRICS", "true");
    let status = Status::start(&sidecar);
    let metrics =
        status.wait_until("vitals", |metrics| metrics.keys().any(|name| name.starts_with("balena_device_online")));
    let value = |name: &str, uuid: &str| metrics.get(&format!("balena_device_{name}{{uuid=\"{uuid}\"}}")).copied();
    assert_eq!((value("online", &fridge), value("online", &offline)), (Some(1.0), Some(0.0)));
    assert_eq!((value("update_pending", &fridge), value("update_pending", &lamp)), (Some(0.0), Some(1.0)));
    assert_eq!(value("last_connectivity_event_timestamp_seconds", &fridge), Some(1_795_330_772.104));
    assert_eq!(metrics[&format!("balena_device_heartbeat_state{{uuid=\"{fridge}\",state=\"online\"}}")], 1.0);
    assert_eq!(metrics[&format!("balena_device_heartbeat_state{{uuid=\"{offline}\",state=\"offline\"}}")], 1.0);
    let mib = 1_048_576.0;
    assert_eq!(value("memory_size_bytes", &fridge), Some(3792.0 * mib));
    assert_eq!(value("memory_used_bytes", &fridge), Some(948.0 * mib));
    assert_eq!(value("storage_size_bytes", &fridge), Some(28_100.0 * mib));
    assert_eq!(value("storage_used_bytes", &fridge), Some(5620.0 * mib));
    assert_eq!(value("cpu_usage_ratio", &fridge), Some(0.07));
    assert_eq!(value("cpu_temperature_celsius", &fridge), Some(51.0));
    assert_eq!((value("undervolted", &fridge), value("undervolted", &low)), (Some(0.0), Some(1.0)));
    assert_eq!((value("memory_used_bytes", &lamp), value("cpu_temperature_celsius", &lamp)), (None, None), "null");
    assert_eq!(value("memory_size_bytes", &uuid("lamp-0003")), None);
    assert!(metrics.keys().filter(|name| name.starts_with("balena_device_info{")).count() == 25, "left out or not");
    let info = metrics.keys().find(|name| name.contains(&fridge) && name.starts_with("balena_device_info{")).unwrap();
    for label in [
        "device_name=\"fridge-01\"",
        "fleet=\"polar-foods/cold-chain\"",
        "device_type=\"raspberrypi4-64\"",
        "release=\"1.9.0\"",
        "os_version=\"balenaOS 6.1.24\"",
        "os_variant=\"prod\"",
        "supervisor_version=\"16.7.6\"",
    ] {
        assert!(info.contains(label), "{label} is not in {info}");
    }
    cloud.change(|devices| devices.retain(|device| device["uuid"] != *fridge));
    status.wait_until("a removal", |metrics| !metrics.keys().any(|name| name.contains(&fridge)));
}

/// The tag of the device beats its fleet's. A muted device is scraped as before, with the same labels.
#[test]
fn a_tag_mutes_the_alerts_of_a_device() {
    const ALERT: &str = "prometheus.io/alert";
    const NAMES: [(&str, Option<&str>, bool); 5] = [
        ("fridge-01", Some("false"), true),
        ("fridge-02", Some("maybe"), true), // counts as absent
        ("fridge-04", None, true),
        ("fridge-05", Some("true"), false),
        ("gw-oslo", None, false),
    ];
    let mut devices = demo_fleet();
    for device in &mut devices {
        if device["belongs_to__application"][0]["slug"] == "polar-foods/cold-chain" {
            let tags = device["belongs_to__application"][0]["application_tag"].as_array_mut().unwrap();
            tags.push(json!({ "tag_key": ALERT, "value": " Off " }));
        }
    }
    let mut uuids = Vec::new();
    for (name, tag, _) in NAMES {
        let device = find(&mut devices, name);
        tag.into_iter().for_each(|value| set_tag(device, ALERT, value));
        uuids.push(device["uuid"].as_str().unwrap().to_owned());
    }
    set_tag(find(&mut devices, "fridge-04"), "prometheus.io/scrape", "false"); // left out, and muted all the same
    let cloud = Cloud::start(devices);
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    let metrics =
        status.wait_until("devices", |metrics| metrics.keys().any(|name| name.starts_with("balena_device_info{")));
    for ((name, _, is_muted), uuid) in NAMES.iter().zip(&uuids) {
        let info = metrics.keys().find(|info| info.starts_with("balena_device_info{") && info.contains(uuid)).unwrap();
        assert_eq!(
            (info.contains("alert="), info.contains(",alert=\"false\"")),
            (*is_muted, *is_muted),
            "{name}: {info}"
        );
    }
    assert!(!sidecar.list().contains("\"alert\""), "{}", sidecar.list());
    let bad = status.running.wait_for("tag prometheus.io/alert of fridge-02");
    assert!(bad.contains("is \"maybe\"") && bad.contains("counts as absent"), "{bad}");
}

/// The age of what balenaCloud says of the devices can be seen, and grows while it does not answer.
#[test]
fn the_last_state_of_the_devices_has_its_time() {
    const NAME: &str = "baletheus_last_device_refresh_timestamp_seconds";
    let cloud = Cloud::start(demo_fleet());
    cloud.intercept(|seen, _| seen.target.contains("heartbeat").then(|| Reply::status(503, &[], b"")));
    let sidecar = sidecar(&cloud).env("DEVICE_REFRESH_RATE", "1s");
    let status = Status::start(&sidecar);
    let metrics = status.wait_until("a list", |metrics| metrics["baletheus_devices"] > 0.0);
    assert_eq!(metrics[NAME], 0.0);
    cloud.heal();
    let first = status.wait_until("a state", |metrics| metrics[NAME] > 1.7e9)[NAME];
    status.wait_until("another", |metrics| metrics[NAME] > first);
}

#[test]
fn nothing_of_it_is_asked_for_without_a_listener_and_discovery_stays_304() {
    let cloud = Cloud::start(demo_fleet());
    let quiet = sidecar(&cloud).env("LISTEN_ADDRESS", "");
    let running = quiet.start();
    running.wait_for("updated balena.json");
    cloud.wait_for_requests(4, PATIENCE);
    assert!(!cloud.requests().iter().any(|seen| seen.target.contains("heartbeat")));
    drop(running);

    cloud.clear_requests();
    let loud = sidecar(&cloud);
    let _status = Status::start(&loud);
    cloud.wait_for_requests(8, PATIENCE);
    let requests = cloud.requests();
    let vitals: Vec<_> = requests.iter().filter(|seen| seen.target.contains("heartbeat")).collect();
    assert!(vitals.len() >= 2 && !vitals[0].target.contains("memory_usage"), "{vitals:#?}");
    let discovery: Vec<_> = requests.iter().filter(|seen| seen.target.contains("is_of__device_type")).collect();
    assert!(discovery.len() >= 2 && discovery[1..].iter().all(|seen| seen.status == 304), "{discovery:#?}");
}

#[test]
fn the_readme_has_every_metric() {
    let cloud = Cloud::start(demo_fleet());
    cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
    let sidecar = sidecar(&cloud).env("DEVICE_METRICS", "true");
    let status = Status::start(&sidecar);
    status.running.wait_for("refresh failed");
    cloud.heal();
    status.running.signal("HUP");
    status.wait_until("vitals", |metrics| metrics.keys().any(|name| name.starts_with("balena_device_online")));
    let text = status.text("/metrics");
    let help = text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '));
    let ours = help.filter(|(name, _)| name.starts_with("bale"));
    let row = |(name, about): (&str, &str)| format!("| `{name}` | {} |", about.trim_end_matches('.'));
    let table =
        ["| metric | tells |", "| --- | --- |"].map(str::to_owned).into_iter().chain(ours.map(row)).collect::<Vec<_>>();
    let document = include_str!("../../docs/metrics.md");
    let found = document.split_once("<!-- metrics:").expect("a mark").1.split_once("-->\n").unwrap().1;
    let found: Vec<_> = found.lines().take_while(|line| !line.is_empty()).collect();
    assert_eq!(found, table, "the table in docs/metrics.md has to be:\n{}\n", table.join("\n"));
}

#[test]
fn health_is_an_exit_code() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    let code = |args: &[&str], listen: &str| {
        let mut command = Command::new(BINARY);
        command.arg("health").args(args).env_clear().env("LISTEN_ADDRESS", listen);
        let output = finish(command);
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let port = status.address.port();
    assert_eq!(code(&[], &status.address.to_string()).0, Some(0));
    assert_eq!(code(&[&format!("http://127.0.0.1:{port}/")], "").0, Some(0));
    // the endpoint listens on 127.0.0.1 only, and localhost is that too
    assert_eq!(code(&[], &format!(":{port}")).0, Some(0));
    assert_eq!(code(&[], ""), (Some(2), "baletheus: no URL is given, and LISTEN_ADDRESS is not set\n".into()));
    let (failed, told) = code(&[&cloud.url()], "");
    assert!(failed == Some(1) && told.contains("answers 404"), "{told}");
    drop(status);
    assert_eq!(code(&[], &format!("127.0.0.1:{port}")).0, Some(1));
}

#[test]
fn vitals_that_fail_fail_no_discovery() {
    let cloud = Cloud::start(demo_fleet());
    cloud.intercept(|seen, _| seen.target.contains("heartbeat").then(|| Reply::status(500, &[], b"")));
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    status.running.wait_for("cannot renew the state of the devices");
    let metrics = status.wait_until("a refresh", |metrics| metrics["baletheus_refreshes_total"] >= 2.0);
    let failures = metrics.iter().filter(|(name, _)| name.starts_with("baletheus_refresh_failures_total"));
    let failures: Vec<_> = failures.map(|(_, count)| *count).collect();
    assert!(failures.len() > 10 && failures.iter().all(|count| *count == 0.0), "{metrics:#?}");
    cloud.heal();
    status.running.wait_for("the state of the devices is known again");
}

#[test]
fn ready_and_targets_wait_for_the_first_list_and_healthy_does_not() {
    let cloud = Cloud::start(demo_fleet());
    cloud.intercept(|_, _| Some(Reply::status(429, &[("Retry-After", "3000")], b"")));
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    status.running.wait_for("refresh failed");
    for path in ["/-/ready", "/targets"] {
        let (code, _, body) = status.get(path);
        let body = String::from_utf8(body).unwrap();
        assert!(code == 503 && body.contains("there is no list yet") && body.contains("429"), "{path}: {code} {body}");
    }
    // a wait that was announced is no hang
    assert_eq!(status.text("/-/healthy"), "healthy\n");
    cloud.heal();
    status.running.signal("HUP");
    status.wait_until("a list", |metrics| metrics["baletheus_devices"] > 0.0);
    assert_eq!(status.text("/-/ready"), "ready\n");
    let (_, head, body) = status.get("/targets");
    assert!(head.contains("content-type: application/json\r\n"), "{head}");
    assert_eq!(String::from_utf8(body).unwrap(), sidecar.list());
    let (_, head, body) = status.send("GET /targets HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n");
    assert!(head.contains("content-encoding: gzip\r\n"), "{head}");
    let mut unpacked = String::new();
    flate2::read::GzDecoder::new(&*body).read_to_string(&mut unpacked).expect("gzip");
    assert_eq!(unpacked, sidecar.list());
}

#[test]
fn it_answers_while_a_refresh_hangs_and_bad_requests_disturb_nothing() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    status.running.wait_for("updated balena.json");
    cloud.intercept(|_, _| Some(Reply::steps([Step::Hang])));
    status.running.signal("HUP");
    cloud.clear_requests();
    cloud.wait_for_requests(1, PATIENCE);
    assert_eq!(status.text("/-/healthy"), "healthy\n");
    // 1,000 connections that say nothing or little
    let idle: Vec<_> = (0..1000)
        .map(|number: u32| {
            let mut stream = TcpStream::connect(status.address).expect("it listens");
            if number.is_multiple_of(2) {
                let _ = stream.write_all(b"GET /met");
            }
            stream
        })
        .collect();
    assert_eq!(status.text("/-/healthy"), "healthy\n");
    let fds = fs::read_dir(format!("/proc/{}/fd", status.running.id())).unwrap().count();
    assert!(fds < 100, "{fds} file descriptors");
    drop(idle);
    assert_eq!(status.send("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").0, 405);
    assert_eq!(status.get("/nosuch").0, 404);
    assert_eq!(status.get("/metrics?x=y").0, 200);
    assert_eq!(status.send(&format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(100_000))).0, 431);
    assert_eq!(status.send("nonsense\r\n\r\n").0, 400);
    assert_eq!(status.text("/-/healthy"), "healthy\n");
}

#[test]
fn the_page_for_people_shows_what_devices_call_themselves_as_text() {
    let cloud = Cloud::start(recorded_devices());
    cloud.change(|devices| devices[0]["device_name"] = json!("<script>alert(1)</script>"));
    let sidecar = sidecar(&cloud).env("ONLINE_ONLY", "true");
    let status = Status::start(&sidecar);
    status.wait_until("a list", |metrics| metrics["baletheus_devices"] > 0.0);
    let page = status.text("/");
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;alert(1)"), "{page}");
    for text in [
        "<title>baletheus: well</title>",
        "Last refresh<td>20",
        "Last error<td>none",
        "balenaCloud sees it offline",
        "<td>gw-0001 (cea099a)<td>cea099a8f5ac3e289e317d461beb9261.balena:80",
    ] {
        assert!(page.contains(text), "{text} is not in {page}");
    }
}

#[test]
fn promtool_is_content_with_the_metrics() {
    let cloud = Cloud::start(recorded_devices());
    let sidecar = sidecar(&cloud).env("DEVICE_METRICS", "true");
    let status = Status::start(&sidecar);
    status.wait_until("vitals", |metrics| metrics.keys().any(|name| name.starts_with("balena_device_online")));
    let text = status.text("/metrics");
    for major in [2, 3] {
        let promtool = tools::prometheus(major).promtool;
        let mut command = Command::new(promtool);
        command.args(["check", "metrics"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.trim().is_empty(), "promtool {major}: {told}\n{text}");
    }
}
