//! `baletheus check`: every way to a device, every kind of answer, and what is said of it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::binary::sidecar;
use crate::support::cloud::{self, Cloud, KEY, Reply, Step};
use crate::support::fleet::{demo_fleet, find, set_tag, sibling};
use crate::support::port::Reserved;
use crate::support::sidecar::{PATIENCE, Sidecar, finish, send};
use crate::support::tls::Authority;
use crate::support::vpn::Vpn;
use flate2::Compression;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

const METRICS: &str = "# HELP up A.\nup{a=\"} 1\\\" \"} 1 1795330772104\nb_total 1.5e3\n\nc NaN\n";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPEN: &str = "application/openmetrics-text; version=1.0.0";

/// What listens on the devices: each path another kind of answer.
fn exporters(cloud: &Cloud) {
    cloud.intercept(|seen, _| {
        let gzip = |text: &[u8]| {
            let (kind, packed) = (("Content-Type", TEXT), ("Content-Encoding", "gzip"));
            Reply::status(200, &[kind, packed], &cloud::gzip(text, Compression::fast()))
        };
        let typed = |kind, body: &str| Reply::status(200, &[("Content-Type", kind)], body.as_bytes());
        let long_comment = format!("# {}\n", "nothing ".repeat(4 << 10));
        Some(match &*seen.target {
            "/metrics" => typed(TEXT, METRICS),
            "/gzip" => {
                assert_eq!(seen.header("accept-encoding"), Some("gzip"));
                assert!(seen.header("accept").unwrap().starts_with("application/openmetrics-text;version=1.0.0"));
                assert_eq!(seen.header("authorization"), None);
                gzip("many{le=\"+Inf\"} 1\n".repeat(12_345).as_bytes())
            }
            "/gzip-sum" | "/gzip-cut" => {
                let mut packed = cloud::gzip(METRICS.as_bytes(), Compression::fast());
                let trailer = packed.len() - 8;
                if seen.target == "/gzip-sum" {
                    packed[trailer] ^= 1
                } else {
                    packed.truncate(trailer)
                }
                Reply::status(200, &[("Content-Type", TEXT), ("Content-Encoding", "gzip")], &packed)
            }
            "/moved" => Reply::status(302, &[("Location", "metrics")], b""),
            "/away" => {
                Reply::status(302, &[("Location", &format!("http://{}.balena:48484/v1/purge", "0".repeat(32)))], b"")
            }
            "/circle" => Reply::status(302, &[("Location", "/circle")], b""),
            "/open" => typed(OPEN, "up 1\n# EOF\n"),
            "/open-half" => typed(OPEN, "up 1\n"),
            "/html" => typed("text/html; charset=utf-8", "<html>"),
            "/prose" => typed(TEXT, "up 1\nHello\u{1b}[2J, who is there?\n"),
            "/crlf" => typed(TEXT, "up 1\r\nup 2\r\n"),
            "/name" => typed(TEXT, "a-b 1\n"),
            "/late" => typed(TEXT, "a 1 2 3\n"),
            "/untyped" => Reply::status(200, &[], METRICS.as_bytes()),
            // In long lines: there is a limit of time, too, and a line costs more than its bytes.
            "/bomb" => gzip(long_comment.repeat(17 << 5).as_bytes()),
            "/endless" => typed(TEXT, &long_comment.repeat(17 << 5)),
            "/endless-line" => typed(TEXT, &"a".repeat(65 << 10)),
            "/upgrade" => Reply::status(101, &[], b""),
            "/hang" => Reply::steps([Step::Hang]),
            "/close" => Reply::steps([Step::Close]),
            "/half" => Reply::steps([
                Step::Send(
                    format!("HTTP/1.1 200 OK\r\nContent-Type: {TEXT}\r\nContent-Length: 99\r\n\r\nup 1\n").into(),
                ),
                Step::Close,
            ]),
            "/ssh" => Reply::steps([Step::Send(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()), Step::Close]),
            _ => Reply::status(404, &[("Content-Type", "text/plain")], b"nothing here"),
        })
    });
}

fn secure(config: Arc<ServerConfig>) -> Cloud {
    let cloud = Cloud::start_over((Ipv4Addr::LOCALHOST, 0).into(), Vec::new(), move |stream| {
        let connection = ServerConnection::new(config.clone()).map_err(std::io::Error::other)?;
        Ok(StreamOwned::new(connection, stream))
    });
    exporters(&cloud);
    cloud
}

/// Devices that are all alike but for their names and exporters.
fn devices(rows: &[(&str, &str)]) -> Vec<Value> {
    let model = find(&mut demo_fleet(), "fridge-02").clone();
    let device = |(id, (name, exporters)): (u64, &(&str, &str))| {
        let mut device = sibling(&model, id, name);
        if !exporters.is_empty() {
            set_tag(&mut device, "prometheus.io/exporters", exporters);
        }
        device
    };
    (1..).zip(rows).map(device).collect()
}

fn uuid(device: &Value) -> &str {
    device["uuid"].as_str().unwrap()
}

fn check(sidecar: &Sidecar, args: &[&str]) -> Output {
    let mut command = sidecar.command();
    // Each device of these tests has exporters of its own.
    command.arg("check").args(args).env("OWN_TAGS", "all");
    let output = finish(command);
    for text in [&output.stdout, &output.stderr] {
        let text = String::from_utf8(text.clone()).expect("UTF-8");
        assert!(!text.contains(KEY) && !text.contains('\u{1b}') && !text.contains('\r'), "{text}");
    }
    assert!(!sidecar.path("balena.json").exists());
    output
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

fn rows(output: &Output) -> Vec<Value> {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no JSON: {output:#?}"))
}

/// Each row as the end of its name, how it ended, why, and what is said of it.
fn compare(output: &Output, expected: &[(&str, &str, &str, &str)]) {
    let rows = rows(output);
    let wrong: Vec<_> = (rows.iter().zip(expected))
        .filter(|(row, (name, result, reason, answer))| {
            let said = row["answer"].as_str().unwrap();
            !(row["device"].as_str().unwrap().starts_with(name)
                && row["result"] == *result
                && reason.split('|').any(|reason| row["reason"].as_str().unwrap_or_default() == reason)
                && answer.split('…').all(|part| said.contains(part))
                && (*result == "answers" && *name != "moved (") == row["hint"].is_null())
        })
        .collect();
    assert!(rows.len() == expected.len() && wrong.is_empty(), "{wrong:#?}\n{}", text(&output.stdout));
}

#[test]
fn through_the_vpn() {
    let authority = Authority::generate();
    let vpn = Vpn::start(KEY, Some(authority.server(&["127.0.0.1"])));
    let backend = Cloud::start(Vec::new());
    exporters(&backend);
    let mut fleet = devices(&[
        ("well", ""),
        ("gzip", "app:9100/gzip"),
        ("gzip-sum", "9100/gzip-sum"),
        ("gzip-cut", "9100/gzip-cut"),
        ("moved", "9100/moved"),
        ("open", "9100/open"),
        ("two", "9100,app:9199"),
        ("missing", "9100/nowhere"),
        ("circle", "9100/circle"),
        ("away", "9100/away"),
        ("host-ssh", "22222"),
        ("html", "9100/html"),
        ("prose", "9100/prose"),
        ("crlf", "9100/crlf"),
        ("name", "9100/name"),
        ("late", "9100/late"),
        ("untyped", "9100/untyped"),
        ("open-half", "9100/open-half"),
        ("bomb", "9100/bomb"),
        ("endless", "9100/endless"),
        ("endless-line", "9100/endless-line"),
        ("upgrade", "9100/upgrade"),
        ("hangs", "9100/hang"),
        ("closes", "9100/close"),
        ("half", "9100/half"),
        ("ssh", "9100/ssh"),
        ("secure", ""),
        ("not-tls", ""),
        ("silent", ""),
        ("gone", ""),
        ("offline", ""),
        ("unknown", ""),
        ("switched-off", ""),
        ("bad-tag", "node:eighty"),
        ("evil\u{1b}[31m\u{202e}", ""),
    ]);
    for device in &fleet {
        vpn.device(uuid(device), |device| _ = device.ports.insert(9100, backend.addr()));
    }
    let secure_uuid = uuid(find(&mut fleet, "secure")).to_owned();
    let inner = secure(authority.server(&[&format!("{}.balena", secure_uuid)]));
    vpn.device(&secure_uuid, |device| _ = device.ports.insert(9100, inner.addr()));
    vpn.device(uuid(find(&mut fleet, "silent")), |device| device.silent = true);
    vpn.device(uuid(find(&mut fleet, "gone")), |device| device.offline = true);
    vpn.device(uuid(find(&mut fleet, "offline")), |device| device.offline = true);
    for name in ["secure", "not-tls"] {
        set_tag(find(&mut fleet, name), "prometheus.io/scheme", "https");
    }
    find(&mut fleet, "offline")["is_connected_to_vpn"] = json!(false);
    find(&mut fleet, "gone")["is_connected_to_vpn"] = Value::Null;
    set_tag(find(&mut fleet, "switched-off"), "prometheus.io/scrape", "false");
    find(&mut fleet, "unknown")["uuid"] = json!("0123456789abcdef".repeat(2));

    let cloud = Cloud::start(fleet);
    let sidecar = sidecar(&cloud)
        .env("TUNNEL_URL", format!("https://{}", vpn.addr))
        .env("BALENA_CA_FILE", "ca.pem")
        .env("EXPORTERS", "9100")
        .env("ONESHOT", "true")
        .env("SD_FILE_PATH", "/nowhere/to/be/found.json");
    fs::write(sidecar.path("ca.pem"), authority.pem()).unwrap();
    let output = check(&sidecar, &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    compare(
        &output,
        &[
            ("well (", "answers", "", "3 samples in "),
            ("gzip (", "answers", "", "12345 samples in "),
            ("gzip-sum (", "fails", "not_metrics", "corrupt gzip stream does not have a matching checksum"),
            ("gzip-cut (", "fails", "not_metrics", "corrupt gzip stream does not have a matching checksum"),
            ("moved (", "answers", "", "3 samples"),
            ("open (", "answers", "", "1 sample in "),
            ("two (", "answers", "", "3 samples"),
            ("two (", "fails", "port_closed", "port 9199 closed or device unreachable (500)"),
            ("missing (", "fails", "http", "HTTP 404 Not Found"),
            ("circle (", "fails", "http", "redirects without end"),
            ("away (", "fails", "redirect", "redirects to 0000…0000.balena:48484, away from the target"),
            ("host-ssh (", "fails", "not_target", "refused: port 22222 is the SSH of the host"),
            ("html (", "fails", "not_metrics", "not metrics, but text/html"),
            ("prose (", "fails", "not_metrics", "not metrics: line 2 is \"Hello"),
            (
                "crlf (",
                "fails",
                "not_metrics",
                "not metrics: line 1 ends with a carriage return, which Prometheus refuses",
            ),
            ("name (", "fails", "not_metrics", "not metrics: line 1 is \"a-b 1"),
            ("late (", "fails", "not_metrics", "not metrics: line 1 is \"a 1 2 3"),
            ("untyped (", "fails", "not_metrics", "no Content-Type, which Prometheus 3 insists on"),
            ("open-half (", "fails", "not_metrics", "OpenMetrics without # EOF"),
            ("bomb (", "fails", "not_metrics", "more than 16 MiB"),
            ("endless (", "fails", "not_metrics", "more than 16 MiB"),
            ("endless-line (", "fails", "not_metrics", "a line of more than 64 KiB"),
            ("upgrade (", "fails", "not_http", "101 Switching Protocols was not asked for"),
            ("hangs (", "fails", "timeout", "timed out after 5 s"),
            ("closes (", "fails", "broke_off", "broke off"),
            ("half (", "fails", "broke_off", "broke off"),
            ("ssh (", "fails", "not_http", "not HTTP"),
            ("secure (", "answers", "", "3 samples"),
            ("not-tls (", "fails", "tls", "TLS: "),
            ("silent (", "fails", "timeout", "no answer in 4.5 s"),
            ("gone (", "fails", "not_connected", "device not connected to the VPN (503)"),
            ("offline (", "offline", "not_connected", "device not connected to the VPN (503)"),
            ("unknown (", "fails", "no_access", "refused: no access, unknown device, or balena's API busy (407)"),
            ("switched-off (", "left_out", "switched_off", "left out: the tag prometheus.io/scrape"),
            ("bad-tag (", "answers", "", "3 samples"),
            ("evil", "answers", "", "3 samples"),
        ],
    );
    let row = &rows(&output)[1];
    assert_eq!(row["url"], format!("http://{}.balena:9100/gzip", row["uuid"].as_str().unwrap()));
    assert_eq!((&row["fleet"], &row["job"]), (&json!("polar-foods/cold-chain"), &json!("app")));
    assert_eq!((&row["online"], &row["samples"], &row["status"]), (&json!(true), &json!(12_345), &Value::Null));
    assert!(row["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{row}");
    assert_eq!(rows(&output)[7]["status"], 500);
    assert_eq!(rows(&output)[24]["hint"], "the exporter's own log may tell more");
    assert_eq!(rows(&output)[27]["url"], format!("https://{secure_uuid}.balena:9100/metrics"));
    let log = text(&output.stderr);
    assert!(log.lines().count() == 1 && log.contains("tag prometheus.io/exporters of bad-tag"), "{log}");
    // neither the redirect's device nor any host's SSH gets a request
    let asked = vpn.requests();
    assert!(asked.iter().all(|head| !head.contains("48484") && !head.contains("22222")), "{asked:?}");
    // the tunnel's host has the key, and nobody else
    let head = vpn.requests().into_iter().next().unwrap();
    let user = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, format!("baletheus:{KEY}"));
    assert!(head.starts_with("CONNECT ") && head.contains(&format!("Proxy-Authorization: Basic {user}\r\n")), "{head}");
    assert!(backend.requests().iter().chain(&inner.requests()).all(|seen| seen.header("authorization").is_none()));

    // for people: one line each, whatever is in it
    let output = check(&sidecar, &[]);
    let table = text(&output.stdout);
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 1 + 36 + 2, "{table}");
    assert!(lines[0].starts_with("DEVICE ") && lines[0].ends_with("WHAT TO DO"), "{table}");
    let (failing, others) = lines.split_at(27);
    let has = |lines: &[&str], part: &str| lines.iter().filter(|line| line.contains(part)).count();
    let is_long = |line: &&str| line.contains(".balena:9100/metrics") && !line.contains("https://");
    assert!(has(others, ".balena:9100  ") > 0 && !lines.iter().any(is_long), "{table}");
    assert!(has(&lines, "  unknown  ") == 1 && has(others, "  offline  ") == 1, "{table}");
    assert!(lines.iter().any(|line| line.starts_with("evil\\u{1b}[31m\\u{202e}")), "{table}");
    assert!(has(others, ".balena:9100/gzip  ") == 1 && has(failing, "line 2 is \"Hello") == 1, "{table}");
    assert_eq!(lines[38], "35 targets: 8 answer, 26 fail, 1 offline; 1 device left out");
}

/// The hints are about what an operator can change: the path only where the path may be wrong.
#[test]
fn what_to_do_depends_on_the_answer() {
    const PATH: &str = "is the path right";
    const HOST: &str = "<uuid>.balena:<port> through the tunnel";
    let backend = Cloud::start(Vec::new());
    let body = |name: &str| format!("# TYPE {name} counter\n{name}{{cpu=\"0\",mode=\"idle\"}} 1\nnode_cpu_count 4\n");
    backend.intercept(move |seen, _| {
        let typed = |body: String| Reply::status(200, &[("Content-Type", TEXT)], body.as_bytes());
        Some(match &*seen.target {
            "/old" => typed(body("node_cpu")),
            "/older" => typed("node_cpu 1\n".into()),
            "/new" => typed(body("node_cpu_seconds_total")),
            "/key" => typed(format!("{KEY} is the key\n")),
            "/bare" => Reply::status(200, &[("Content-Type", "text/plain; charset")], b"up 1\n"),
            "/moved" => Reply::status(301, &[("Location", "/new")], b""),
            "/both" => typed(body("node_cpu_seconds_total") + &body("node_cpu")),
            status => Reply::status(status[1..].parse().unwrap(), &[], b""),
        })
    });
    #[rustfmt::skip] // a table
    let cases = [
        ("9100/401", "fails", "HTTP 401", "it wants a password or a token: give it to Prometheus"),
        ("9100/403", "fails", "HTTP 403", HOST),
        ("9100/400", "fails", "HTTP 400", HOST),
        ("9100/421", "fails", "HTTP 421", HOST),
        ("9100/404", "fails", "HTTP 404", PATH),
        ("9100/503", "fails", "HTTP 503", "the exporter's own log"),
        ("9100/old", "answers", "2 samples", "older than 0.16, and the dashboards do not know its names"),
        ("9100/older", "answers", "1 sample", "older than 0.16"),
        ("9100/new", "answers", "2 samples", ""),
        ("9100/both", "answers", "4 samples", ""),
        ("9100/key", "fails", "not metrics: line 1 is \"(the API key)", PATH),
        ("9100/bare", "fails", "a Content-Type with a parameter without a value", PATH),
        ("9100/moved", "answers", "2 samples", "it redirects, and the jobs of prometheus.yml follow no redirect"),
        ("9443", "fails", "TLS: invalid peer certificate", "tls_config with ca_file or insecure_skip_verify in Prometheus"),
        ("9444", "fails", "TLS: invalid peer certificate", "tls_config with ca_file or insecure_skip_verify in Prometheus"),
        ("9102", "fails", "TLS: ", "does the exporter speak https on this port?"),
    ];
    let mut fleet = devices(&cases.map(|(exporter, ..)| (exporter, exporter)));
    let vpn = Vpn::start(KEY, None);
    let authority = Authority::generate();
    let name = format!("{}.balena", uuid(find(&mut fleet, "9443")));
    let (own, itself) = (secure(authority.server(&[&name])), secure(Authority::generate().itself()));
    for device in &mut fleet {
        let uuid = uuid(device).to_owned();
        let port: u16 = device["device_name"].as_str().unwrap()[..4].parse().unwrap();
        let address = match port {
            9443 => own.addr(),
            9444 => itself.addr(),
            _ => backend.addr(),
        };
        vpn.device(&uuid, |device| {
            device.ports.insert(port, address);
        });
        if port != 9100 {
            set_tag(device, "prometheus.io/scheme", "https");
        }
    }
    let cloud = Cloud::start(fleet);
    let sidecar = sidecar(&cloud).env("TUNNEL_URL", vpn.url());
    let rows = rows(&check(&sidecar, &["--json"]));
    for (row, (exporter, result, answer, hint)) in rows.iter().zip(cases) {
        let holds = |field: &str, text: &str| row[field].as_str().unwrap_or_default().contains(text);
        assert!(row["result"] == result && holds("answer", answer) && holds("hint", hint), "{exporter}: {row}");
        assert!(!row["hint"].is_null() || hint.is_empty(), "{exporter}: {row}");
        assert_eq!(holds("hint", PATH), hint == PATH, "{exporter}: {row}");
    }
    // With the certificate of its CA, the exporter answers.
    fs::write(sidecar.path("ca.pem"), authority.pem()).unwrap();
    let rows = self::rows(&check(&sidecar, &["--json", "--ca-file", "ca.pem"]));
    let secure = rows.iter().find(|row| row["device"].as_str().unwrap().starts_with("9443")).unwrap();
    assert!(secure["result"] == "answers" && secure["hint"].is_null(), "{secure}");
}

/// A CA is trusted to vouch for servers, and not as one: --ca-file does not help, so nothing asks for it.
#[test]
fn a_server_that_shows_the_certificate_of_its_ca_is_told_apart() {
    const SAYS: &str = "the server shows the certificate of a CA itself, which --ca-file (CA_FILE) cannot help";
    let authority = Authority::generate();
    let api = secure(authority.itself());
    let vpn = Vpn::start(KEY, Some(authority.itself()));
    let cloud = Cloud::start(devices(&[("one", "")]));
    let plain = sidecar(&cloud).env("CA_FILE", "ca.pem").env("TUNNEL_URL", format!("https://{}", vpn.addr));
    fs::write(plain.path("ca.pem"), authority.pem()).unwrap();
    let rows = rows(&check(&plain, &["--json"]));
    assert!(rows[0]["reason"] == "no_tunnel" && rows[0]["hint"].as_str().unwrap().starts_with(SAYS), "{rows:#?}");
    let output = check(&plain, &["--api-url", &format!("https://{}", api.addr())]);
    let log = text(&output.stderr);
    assert!(log.contains("cannot trust https://") && log.contains(SAYS) && !log.contains("does it need"), "{log}");
}

#[test]
fn exit_code_0_if_all_that_should_answer_do() {
    let vpn = Vpn::start(KEY, None);
    let backend = Cloud::start(Vec::new());
    exporters(&backend);
    let mut fleet = devices(&[("well", ""), ("offline", ""), ("switched-off", "")]);
    find(&mut fleet, "offline")["is_connected_to_vpn"] = json!(false);
    set_tag(find(&mut fleet, "switched-off"), "prometheus.io/scrape", "no");
    for device in &fleet {
        vpn.device(uuid(device), |device| _ = device.ports.insert(80, backend.addr()));
    }
    vpn.device(uuid(&fleet[1]), |device| device.offline = true);
    let cloud = Cloud::start(fleet);
    let sidecar = sidecar(&cloud);
    let output = check(&sidecar, &["--tunnel-url", &format!("http://{}", vpn.addr), "--json"]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    compare(
        &output,
        &[
            ("well", "answers", "", "3 samples"),
            ("offline", "offline", "not_connected", "(503)"),
            ("switched-off", "left_out", "switched_off", "left out"),
        ],
    );
}

#[test]
fn a_tunnel_host_that_is_none() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = Cloud::start(Vec::new());
    let authority = Authority::generate();
    let untrusted = Vpn::start(KEY, Some(authority.server(&["127.0.0.1"])));
    let wrong_key = Vpn::start("another", None);
    let endless = Cloud::start(Vec::new());
    endless.intercept(|_, _| {
        let header = format!("X-More: {}\r\n", "more".repeat(1000));
        let head = format!("HTTP/1.1 200 OK\r\n{}", header.repeat(20));
        Some(Reply::steps([Step::Send(head.into()), Step::Hang]))
    });
    let cloud = Cloud::start(devices(&[("well", "")]));
    let cases = [
        ("http://127.0.0.1:1".to_owned(), "no_tunnel", "tunnel host not reachable: connection refused"),
        (format!("http://{}", silent.local_addr().unwrap()), "timeout", "no answer in 4.5 s"),
        (
            format!("https://{}", silent.local_addr().unwrap()),
            "no_tunnel",
            "tunnel host not reachable: no answer in 4.5 s",
        ),
        (format!("https://{}", untrusted.addr), "no_tunnel", "tunnel host not reachable: TLS: …certificate"),
        (format!("http://{}", wrong_key.addr), "no_access", "(407)"),
        (other.url(), "bad_tunnel", "the tunnel host is no VPN proxy of balena's (404)"),
        (endless.url(), "bad_tunnel", "the tunnel host sends a head of more than 8 KiB"),
    ];
    // All at once, since two of them wait.
    thread::scope(|scope| {
        for (url, reason, said) in cases {
            let cloud = &cloud;
            scope.spawn(move || {
                let output = check(&sidecar(cloud).env("TUNNEL_URL", url), &["--json"]);
                assert_eq!(output.status.code(), Some(1));
                compare(&output, &[("well", "fails", reason, said)]);
            });
        }
    });
}

#[test]
fn public_urls() {
    let authority = Authority::generate();
    let backend = secure(authority.server(&["*.devices.test"]));
    let other = secure(authority.server(&["*.other.test"]));
    let mut fleet =
        devices(&[("well", ""), ("switched-off", ""), ("another's", ""), ("unknown", ""), ("path", "80/html")]);
    for device in &mut fleet {
        device["is_web_accessible"] = json!(true);
    }
    find(&mut fleet, "switched-off")["is_web_accessible"] = json!(false);
    let proxy = Vpn::proxy();
    for (device, addr) in [(&fleet[0], backend.addr()), (&fleet[2], other.addr()), (&fleet[4], backend.addr())] {
        proxy.device(&format!("{}.devices.test", uuid(device)), |device| _ = device.ports.insert(443, addr));
    }
    let cloud = Cloud::start(fleet);
    let sidecar = sidecar(&cloud)
        .env("HTTPS_PROXY", format!("http://{}", proxy.addr))
        .env("USE_PUBLIC_URLS", "true")
        .env("PUBLIC_URL_DOMAIN", "devices.test")
        .env("BALENA_CA_FILE", "ca.pem");
    fs::write(sidecar.path("ca.pem"), authority.pem()).unwrap();
    let output = check(&sidecar, &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    compare(
        &output,
        &[
            ("well", "answers", "", "3 samples"),
            ("switched-off", "left_out", "no_public_url", "left out: its public device URL is switched off"),
            ("another's", "fails", "tls", "TLS: …certificate not valid for name"),
            ("unknown", "fails", "proxy", "the proxy http://127.0.0.1:…(HTTPS_PROXY) answers 407"),
            ("path", "fails", "not_metrics", "not metrics, but text/html"),
        ],
    );
    assert!(proxy.requests().iter().all(|head| !head.to_lowercase().contains("authorization")));
    // without a way out, or without a name server
    let output = check(&sidecar.env("NO_PROXY", "*"), &["--json", "--public-domain=devices.invalid"]);
    for row in rows(&output).iter().filter(|row| row["result"] != "left_out") {
        assert!(["no_such_host", "timeout"].contains(&row["reason"].as_str().unwrap()), "{row}");
    }
}

#[test]
fn lan_addresses() {
    // nothing is sent; a machine without any network has no address to try
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let own = socket.connect("198.51.100.1:9").and_then(|()| socket.local_addr()).map(|addr| addr.ip());
    let own = own.expect("this machine has an address in a network");
    let backend = Cloud::start_at((IpAddr::from(Ipv4Addr::UNSPECIFIED), 0).into(), Vec::new());
    exporters(&backend);
    let port = backend.addr().port();
    let reserved = Reserved::any();
    let closed = reserved.number();
    let mut fleet = devices(&[
        ("well", &format!("{port}")),
        ("path", &format!("app:{port}/gzip")),
        ("closed", &format!("{closed}")),
        ("secure", &format!("{closed}")),
        ("nowhere", ""),
        ("addressless", ""),
    ]);
    for device in &mut fleet {
        device["ip_address"] = json!(format!("127.0.0.1 {own}"));
    }
    set_tag(find(&mut fleet, "secure"), "prometheus.io/scheme", "https");
    find(&mut fleet, "nowhere")["ip_address"] = json!("2001:db8::1");
    find(&mut fleet, "addressless")["ip_address"] = Value::Null;
    let cloud = Cloud::start(fleet);
    let output = check(
        // Prometheus asks no proxy, and there is none.
        &sidecar(&cloud)
            .env("HTTPS_PROXY", "http://127.0.0.1:1")
            .env("TARGET_ADDRESS", "lan")
            .env("LAN_NETWORKS", format!("{own}/32,2001:db8::/32")),
        &["--json"],
    );
    assert_eq!(output.status.code(), Some(1));
    compare(
        &output,
        &[
            ("well", "answers", "", "3 samples"),
            ("path", "answers", "", "12345 samples"),
            ("closed", "fails", "refused", "connection refused"),
            ("secure", "fails", "refused", "connection refused"),
            ("nowhere", "fails", "no_route|timeout", ""),
            ("addressless", "left_out", "no_lan_address", "left out: it reports no usable LAN address"),
        ],
    );
}

#[test]
fn what_hangs_holds_up_nobody_for_long() {
    let vpn = Vpn::start(KEY, None);
    let backend = Cloud::start(Vec::new());
    exporters(&backend);
    let names: Vec<_> = (0..100).map(|number| format!("device-{number:03}")).collect();
    let mut fleet = devices(&names.iter().map(|name| (&**name, "")).collect::<Vec<_>>());
    for (number, device) in fleet.iter_mut().enumerate() {
        vpn.device(uuid(device), |device| {
            device.ports.insert(80, backend.addr());
            device.silent = number < 30;
        });
        // Each for its own time-out.
        if number == 0 {
            set_tag(device, "prometheus.io/interval", "2m");
            set_tag(device, "prometheus.io/timeout", "2s");
        }
    }
    let cloud = Cloud::start(fleet);
    let start = Instant::now();
    let output = check(&sidecar(&cloud).env("TUNNEL_URL", format!("http://{}", vpn.addr)), &["--json"]);
    let took = start.elapsed();
    let rows = rows(&output);
    let hung = rows.iter().filter(|row| row["reason"] == "timeout").count();
    let answered = rows.iter().filter(|row| row["result"] == "answers").count();
    assert_eq!((hung, answered), (30, 70), "{rows:#?}");
    let late = rows.iter().map(|row| row["answer"].as_str().unwrap());
    assert_eq!(
        late.filter(|answer| answer.starts_with("no answer in 1.8 s") || *answer == "timed out after 2 s").count(),
        1
    );
    // One after another, they would take 133 s.
    assert!((Duration::from_secs(4)..Duration::from_secs(100)).contains(&took), "{took:?}");
}

/// Three devices of the demo. Two do not answer, and one is offline.
fn three() -> (Cloud, Vpn, Sidecar) {
    let all = demo_fleet();
    let chosen = ["fridge-01", "fridge-03", "fridge-04"];
    let cloud =
        Cloud::start(all.into_iter().filter(|one| chosen.iter().any(|name| one["device_name"] == *name)).collect());
    let (vpn, sidecar) = (Vpn::start(KEY, None), sidecar(&cloud));
    let sidecar = sidecar.env("TUNNEL_URL", vpn.url()).env("EXPORTERS", "node:9100");
    (cloud, vpn, sidecar)
}

#[test]
fn one_device_by_its_name_or_uuid() {
    let (cloud, _vpn, sidecar) = three();
    let uuid = cloud.change(|devices| find(devices, "fridge-04")["uuid"].as_str().unwrap().to_owned());
    let names = |args: &[&str]| -> Vec<String> {
        let devices = rows(&check(&sidecar, args));
        devices.iter().map(|row| row["device"].as_str().unwrap()[..9].to_owned()).collect()
    };
    assert_eq!(names(&["FRIDGE-03", "--json"]), ["fridge-03"]);
    assert_eq!(names(&["--json", &uuid]), ["fridge-04"]);
    assert_eq!(names(&["--json", &uuid[..10]]), ["fridge-04"]);
    assert_eq!(names(&["--json", "fridge"]).len(), 3);
    // Nor the middle of a uuid nor what stands around its beginning in the log, but both as the log has them.
    assert_eq!(names(&["--json", &format!("fridge-04 ({})", &uuid[..7])]), ["fridge-04"]);
    for other in [&uuid[1..7], "("] {
        assert!(text(&check(&sidecar, &[other]).stderr).contains("no device has "), "{other}");
    }
    // The page has every field.
    let page = include_str!("../../docs/troubleshooting.md");
    let (_, fields) = page.split_once("`--json` prints").expect("the fields");
    let (fields, _) = fields.split_once("\n\n").expect("an end");
    for field in rows(&check(&sidecar, &["--json"]))[0].as_object().unwrap().keys() {
        assert!(fields.contains(&format!("`{field}`")), "{field}: {fields}");
    }
    let none = check(&sidecar, &["freezer"]);
    let told = text(&none.stderr);
    assert!(none.status.code() == Some(1) && none.stdout.is_empty(), "{told}");
    assert!(told.contains("no device has \"freezer\" in its name") && told.contains("lists 3 devices"), "{told}");
    let none = check(&sidecar, &["freezer", "--report"]);
    assert!(none.status.code() == Some(1) && !text(&none.stderr).contains("freezer"), "{none:?}");
    // It would check every device.
    for blank in ["", " "] {
        let none = check(&sidecar, &[blank]);
        assert!(none.status.code() == Some(2) && text(&none.stderr).contains("NAME is empty"), "{none:?}");
    }
}

#[test]
fn what_fails_comes_first_and_can_be_all_that_is_shown() {
    let (_cloud, _vpn, sidecar) = three();
    let first = |output: &Output| text(&output.stdout).lines().nth(1).unwrap_or_default().to_owned();
    let all = check(&sidecar, &[]);
    let counts = "\n3 targets: 0 answer, 2 fail, 1 offline; 0 devices left out\n";
    assert!(!first(&all).contains("fridge-03") && text(&all.stdout).ends_with(counts), "{}", text(&all.stdout));
    let failing = check(&sidecar, &["--failing"]);
    assert!(!text(&failing.stdout).contains("fridge-03") && text(&failing.stdout).ends_with(counts));
    assert_eq!(rows(&check(&sidecar, &["--failing", "--json"])).len(), 2);
}

/// A terminal gives each of these letters two columns.
#[test]
fn names_in_wide_letters_shift_no_column() {
    let (cloud, _vpn, sidecar) = three();
    cloud.change(|devices| find(devices, "fridge-03")["device_name"] = json!("冷蔵庫"));
    let output = check(&sidecar, &[]);
    let table = text(&output.stdout);
    let columns = |line: &str| -> usize { line.chars().map(|c| if "冷蔵庫".contains(c) { 2 } else { 1 }).sum() };
    let before: Vec<_> = table.lines().take(4).map(|line| columns(line.split("polar-foods").next().unwrap())).collect();
    assert!(table.contains("冷蔵庫 (") && before[1..] == [before[1]; 3], "{table}");
}

#[test]
fn a_narrow_terminal_gets_two_lines_a_device() {
    let (_cloud, _vpn, sidecar) = three();
    let sidecar = sidecar.env("COLUMNS", "80");
    let output = check(&sidecar, &[]);
    let table = text(&output.stdout);
    let lines: Vec<_> = table.lines().take_while(|line| !line.is_empty()).collect();
    assert_eq!(lines.len(), 6, "{table}");
    assert!(lines[0].starts_with("fridge-0") && lines[0].contains("), online: "), "{table}");
    assert!(lines[1].starts_with("    node:9100: "), "{table}");
    let left_out = check(&sidecar.env("EXPORTERS", "none"), &[]);
    assert!(text(&left_out.stdout).contains("online: left out: "), "{}", text(&left_out.stdout));
    assert!(text(&left_out.stdout).contains("\n    declare it with "), "{}", text(&left_out.stdout));
}

/// What it has can be pasted into a public issue.
#[test]
fn a_report_for_an_issue_names_nothing() {
    let (cloud, _vpn, sidecar) = three();
    let secret = cloud.change(|devices| {
        let uuids = devices.iter().map(|device| device["uuid"].as_str().unwrap().to_owned());
        uuids.chain(["fridge", "polar", "cold-chain", "127.0.0.1"].map(str::to_owned)).collect::<Vec<_>>()
    });
    let output = check(&sidecar, &["--report", "--fleet=polar-foods/cold-chain"]);
    let report = text(&output.stdout);
    assert_eq!(text(&output.stderr), "");
    for name in secret {
        assert!(!report.contains(&name) && !report.contains(&name[..6.min(name.len())]), "{name}: {report}");
    }
    assert!(report.starts_with(&format!("baletheus {} on linux ", env!("CARGO_PKG_VERSION"))), "{report}");
    for line in [
        "selection: 1 fleet, 0 tags",
        "targets: address vpn, 1 exporter by option,",
        "refresh: ",
        "results: ",
        "| device-1 | fleet-1 | online | http:9100 | option | fails | ",
    ] {
        assert!(report.contains(line), "{line}: {report}");
    }
    assert_eq!(report.matches("| device-").count(), 3, "{report}");
    cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
    let failed = check(&sidecar, &["--report"]);
    assert!(failed.status.code() == Some(1), "{failed:?}");
    assert!(text(&failed.stdout).contains("refresh: failed, reason server_error, HTTP status 503"), "{failed:?}");
    assert!(!text(&failed.stderr).contains("127.0.0.1"), "{failed:?}");
}

#[test]
fn a_check_that_is_stopped_reports_what_it_knows() {
    let backend = Cloud::start(Vec::new());
    exporters(&backend);
    let fleet = devices(&[("well", ""), ("hangs", "9100/hang")]);
    let vpn = Vpn::start(KEY, None);
    for device in &fleet {
        vpn.device(uuid(device), |device| _ = device.ports.insert(9100, backend.addr()));
    }
    let cloud = Cloud::start(fleet);
    let sidecar = sidecar(&cloud).env("TUNNEL_URL", vpn.url()).env("EXPORTERS", "9100").env("OWN_TAGS", "all");
    // The signal may come before the answer of the one that is well.
    for _ in 0..10 {
        backend.clear_requests();
        let mut command = sidecar.command();
        let child = command.arg("check").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
        backend.wait_for_requests(2, PATIENCE);
        send(child.id(), "INT").expect("it runs");
        let output = child.wait_with_output().expect("its output");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let log = text(&output.stderr);
        if log.contains("stopped: 1 target not tried") {
            let table = text(&output.stdout);
            assert!(table.contains("well (") && !table.contains("hangs ("), "{table}");
            assert!(table.ends_with("\n1 target: 1 answer, 0 fail, 0 offline; 0 devices left out\n"), "{table}");
            return;
        }
        assert!(log.contains("stopped: 2 targets not tried"), "{log}");
    }
    panic!("no target was tried before the signal");
}

#[test]
fn what_cannot_be_checked() {
    let cloud = Cloud::start(devices(&[("well", "")]));
    let closed = "http://127.0.0.1:1";
    let code_and_log = |args: &[&str], sidecar: Sidecar| {
        let output = check(&sidecar.env("TUNNEL_URL", closed), args);
        (output.status.code(), text(&output.stdout).to_owned(), text(&output.stderr).to_owned())
    };
    // The key of another server is none for balenaCloud.
    let empty = Cloud::start(Vec::new());
    let log = text(&check(&sidecar(&empty), &[]).stderr).to_owned();
    let said = "goes to https://tunnel.balena-cloud.com/: set --tunnel-url (TUNNEL_URL)";
    assert!(log.contains(&format!("the key of {} {said}", empty.url())), "{log}");
    // configuration
    for (args, named) in [
        (&["--address", "car"][..], "--address"),
        (&["--tunnel-url=tunnel.example"], "--tunnel-url"),
        (&["--nosuch"], "--nosuch"),
    ] {
        let (code, out, log) = code_and_log(args, sidecar(&cloud));
        assert!((code, &*out) == (Some(2), "") && log.contains(named), "{log}");
    }
    let before = sidecar(&cloud).args(["--online-only", "check"]);
    assert_eq!(finish(before.command()).status.code(), Some(2), "an option before it would not be its own");
    // the API
    let (code, out, log) = code_and_log(&[], sidecar(&cloud).env("BALENA_API_URL", closed));
    assert!((code, &*out) == (Some(1), "") && log.contains("cannot check: cannot reach http://127.0.0.1:1"), "{log}");
    let (code, _, log) = code_and_log(&[], sidecar(&cloud).env("API_KEY", "a-bad-one"));
    assert!(code == Some(1) && log.contains("401") && !log.contains("a-bad-one"), "{log}");
    // the list is there, and what is asked for beside it is not
    cloud.intercept(|seen, _| seen.target.contains("is_connected_to_vpn").then(|| Reply::status(500, &[], b"")));
    let (code, _, log) = code_and_log(&[], sidecar(&cloud));
    assert!(code == Some(1) && log.contains("cannot check: ") && log.contains("500"), "{log}");
    cloud.heal();
    // nothing there
    let (code, out, log) = code_and_log(&["--fleet", "no/such"], sidecar(&cloud));
    assert!(code == Some(1) && out == "0 targets: 0 answer, 0 fail, 0 offline; 0 devices left out\n", "{out}");
    assert!(log.contains("the API lists no device that --fleet") && !log.contains("was asked for"), "{log}");
    let (code, out, _) = code_and_log(&["--fleet", "no/such", "--json"], sidecar(&cloud));
    assert_eq!((code, &*out), (Some(1), "[\n]\n"));
    // a key that sees one device only is told of
    cloud.add_device_key("a-devices-key", 1);
    let (_, _, log) = code_and_log(&[], sidecar(&cloud).env("API_KEY", "a-devices-key"));
    assert!(log.contains("the API key is a device's own"), "{log}");
}
