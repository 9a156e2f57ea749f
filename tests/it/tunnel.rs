//! `baletheus tunnel`: where it goes and where not, what it passes through, and what is said of each failure.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::binary;
use crate::support::cloud::KEY;
use crate::support::sidecar::{PATIENCE, Running, Sidecar, finish};
use crate::support::tls::Authority;
use crate::support::vpn::{Device, Vpn};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection, StreamOwned};
use serde_json::json;

/// The devices, by a letter of their uuid.
fn uuid(letter: char) -> String {
    letter.to_string().repeat(32)
}

fn target(letter: char) -> String {
    format!("{}.balena:9100", uuid(letter))
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    line: String,
    headers: BTreeMap<String, String>,
    /// The number of the connection that it came in.
    connection: usize,
}

/// What listens on a device: gives each request, and the number of its connection, to a function that answers it.
struct Exporter {
    addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Exporter {
    /// The connection goes on as long as the function says so.
    fn start(answer: impl Fn(&Seen, &mut TcpStream) -> bool + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (seen, answer) = (Arc::new(Mutex::new(Vec::new())), Arc::new(answer));
        let requests = seen.clone();
        thread::spawn(move || {
            for (connection, stream) in listener.incoming().enumerate() {
                let (mut stream, requests, answer) = (stream.unwrap(), requests.clone(), answer.clone());
                thread::spawn(move || {
                    while let Some(request) = read(&mut stream, connection) {
                        requests.lock().unwrap().push(request.clone());
                        if !answer(&request, &mut stream) {
                            return;
                        }
                    }
                });
            }
        });
        Exporter { addr, seen }
    }

    fn saying(answer: &'static str) -> Self {
        Self::start(move |_, stream| stream.write_all(answer.as_bytes()).is_ok())
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn read(stream: &mut TcpStream, connection: usize) -> Option<Seen> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let line = lines.next()?;
    let header = |line: String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    Some(Seen { line, headers: lines.filter_map(header).collect(), connection })
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nup 1\n";

/// The tunnel, with devices a, b and c as targets.
struct Setup {
    vpn: Vpn,
    url: String,
    running: Running,
    sidecar: Sidecar,
}

impl Setup {
    fn start(vpn: Vpn) -> Self {
        let sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY).env("RUST_LOG", "debug");
        Self::with(vpn, sidecar)
    }

    fn with(vpn: Vpn, sidecar: Sidecar) -> Self {
        let setup = (vpn.url(), sidecar);
        write(&setup.1, &groups(&['a', 'b', 'c'].map(target)));
        let (running, url) = setup.1.tunnel(&setup.0);
        Setup { vpn, url, running, sidecar: setup.1 }
    }

    /// A device whose port 9100 is this one's.
    fn device(&self, letter: char, exporter: SocketAddr) {
        self.vpn
            .device(&uuid(letter), |device| *device = Device { ports: [(9100, exporter)].into(), ..<_>::default() });
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.url.strip_prefix("http://").unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends bytes, and gives what comes until the end.
    fn send(&self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer); // an answer that breaks off may end with a reset
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// What Prometheus sends; gives the status line and the body.
    fn scrape(&self, target: &str) -> (String, String) {
        let answer = self.send(&format!(
            "GET http://{target}/metrics HTTP/1.1\r\nHost: {target}\r\nUser-Agent: Prometheus/3.5.3\r\nConnection: close\r\n\r\n"
        ));
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
        (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
    }

    /// Expects a failure, whose reason stands in the status line, for Prometheus, and in the body.
    fn expect(&self, target: &str, status: u16, reason: &str) {
        let expected = (format!("HTTP/1.1 {status} {reason}"), format!("{reason}\n"));
        assert_eq!(self.scrape(target), expected, "{}", self.running.log().join("\n"));
    }

    /// The values of a metric, by its labels.
    fn metric(&self, name: &str) -> BTreeMap<String, f64> {
        let text = self.send("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let samples = text.lines().filter_map(|line| line.strip_prefix(name));
        let samples = samples.filter(|rest| rest.starts_with([' ', '{'])).map(|rest| rest.rsplit_once(' ').unwrap());
        samples.map(|(labels, value)| (labels.to_owned(), value.parse().unwrap())).collect()
    }

    /// How many scrapes ended with each result that occurred.
    fn results(&self) -> BTreeMap<String, f64> {
        let mut results = self.metric("baletheus_tunnel_scrapes_total");
        results.retain(|_, count| *count > 0.0);
        results
    }

    fn wait_for_metric(&self, name: &str, labels: &str, expected: f64) {
        let deadline = Instant::now() + PATIENCE;
        while self.metric(name).get(labels) != Some(&expected) {
            assert!(Instant::now() < deadline, "{name}{labels} is not {expected}: {:?}", self.metric(name));
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn handshakes(&self) -> usize {
        self.vpn.requests().len()
    }

    /// Replaces the target file, and waits until the tunnel has read it: while the disk is slow, the old list decides.
    fn replace(&self, text: &str) {
        let reads = || self.running.log().iter().filter(|line| line.ends_with(" in balena.json")).count();
        let (before, deadline) = (reads(), Instant::now() + PATIENCE);
        write(&self.sidecar, text);
        while reads() == before {
            assert!(Instant::now() < deadline, "{}", self.running.log().join("\n"));
            self.metric(""); // it reads the file first
        }
    }
}

/// How long a target may still be scraped after it is gone from the target file.
const CHECK_HOLDS: Duration = Duration::from_secs(1);

/// The text of a target file.
fn groups(targets: &[String]) -> String {
    let groups: Vec<_> = targets.iter().map(|target| json!({"targets": [target], "labels": {"uuid": "x"}})).collect();
    serde_json::to_string(&groups).unwrap()
}

/// Replaces the target file.
fn write(sidecar: &Sidecar, text: &str) {
    fs::write(sidecar.path("new.json"), text).unwrap();
    fs::rename(sidecar.path("new.json"), sidecar.path("balena.json")).unwrap();
}

#[test]
fn a_scrape_passes_through_as_it_is() {
    let exporter = Exporter::start(|_, stream| {
        let head = "HTTP/1.1 200 Fine\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Encoding: gzip\r\n";
        let answer = format!(
            "{head}Keep-Alive: timeout=5\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        stream.write_all(answer.as_bytes()).and_then(|()| stream.write_all(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")).is_ok()
    });
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device('a', exporter.addr);
    let target = target('a');
    let answer = setup.send(&format!(
        "GET http://{target}/probe?target=x&y=%20 HTTP/1.1\r\nHost: elsewhere\r\nUser-Agent: Prometheus/3.5.3\r\n\
         Accept: application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1\r\nAccept-Encoding: gzip\r\n\
         X-Prometheus-Scrape-Timeout-Seconds: 10\r\nAuthorization: Basic eDp5\r\n\
         Proxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\nConnection: close, X-Mine\r\nX-Mine: 1\r\n\r\n"
    ));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let lines = head.lines().filter(|line| !line.starts_with("date: ")).collect::<Vec<_>>();
    let expected = [
        "HTTP/1.1 200 Fine",
        "content-type: text/plain; version=0.0.4",
        "content-encoding: gzip",
        "x-hop: 1",
        "transfer-encoding: chunked",
        "connection: close",
    ];
    assert_eq!(lines.iter().copied().collect::<BTreeSet<_>>(), expected.into_iter().collect(), "{head}");
    assert_eq!(body, "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
    let [seen] = &exporter.seen()[..] else { panic!("{:?}", exporter.seen()) };
    assert_eq!(seen.line, "GET /probe?target=x&y=%20 HTTP/1.1");
    let headers = [
        ("accept", "application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1"),
        ("accept-encoding", "gzip"),
        ("authorization", "Basic eDp5"),
        ("host", &target),
        ("user-agent", "Prometheus/3.5.3"),
        ("x-prometheus-scrape-timeout-seconds", "10"),
    ];
    assert_eq!(seen.headers, headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
}

/// An exporter that says its length and sends chunks: these count.
#[test]
fn chunks_count_where_a_length_is_told_as_well() {
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device('a', Exporter::saying(answer).addr);
    let target = target('a');
    let answer = setup.send(&format!("GET http://{target}?x=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
    assert!(!answer.contains("content-length") && answer.ends_with("\r\n\r\n5\r\nhello\r\n0\r\n\r\n"), "{answer}");
}

#[test]
fn a_tunnel_is_kept_and_used_again() {
    let exporter = Exporter::saying(OK);
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device('a', exporter.addr);
    for _ in 0..5 {
        assert_eq!(setup.scrape(&target('a')), ("HTTP/1.1 200 OK".to_owned(), "up 1\n".to_owned()));
    }
    let requests = setup.vpn.requests();
    let [head] = &requests[..] else { panic!("{requests:?}") };
    assert!(head.starts_with(&format!("CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n", target('a'))), "{head}");
    assert_eq!(exporter.seen().iter().filter(|seen| seen.connection == 0).count(), 5);
    assert_eq!(setup.metric("baletheus_tunnel_handshakes_total"), [(String::new(), 1.0)].into());
    assert_eq!(setup.results(), [("{result=\"ok\"}".to_owned(), 5.0)].into());
    assert_eq!(setup.metric("baletheus_tunnel_duration_seconds_count"), [(String::new(), 5.0)].into());
    assert_eq!(setup.metric("baletheus_tunnel_open"), [(String::new(), 1.0)].into());
    assert_eq!(setup.metric("baletheus_tunnel_targets"), [(String::new(), 3.0)].into());
    let bytes = setup.metric("baletheus_tunnel_bytes_total");
    assert!(bytes["{direction=\"received\"}"] > 5.0 * OK.len() as f64, "{bytes:?}");
    assert!(bytes["{direction=\"sent\"}"] > setup.vpn.requests()[0].len() as f64, "{bytes:?}");
}

/// `increase()` does not see the first scrape of a result whose series starts with it.
#[test]
fn each_result_is_counted_from_0() {
    let setup = Setup::start(Vpn::start(KEY, None));
    let results = setup.metric("baletheus_tunnel_scrapes_total");
    let expected = [
        "bad_request",
        "bad_tunnel",
        "broke_off",
        "busy",
        "gone",
        "no_access",
        "no_device",
        "no_tunnel",
        "not_connected",
        "not_http",
        "not_target",
        "ok",
        "port_closed",
        "timeout",
        "too_large",
    ];
    assert_eq!(results, expected.map(|result| (format!("{{result=\"{result}\"}}"), 0.0)).into());
}

#[test]
fn a_kept_tunnel_that_was_closed_fails_no_scrape() {
    // which closes the connection after its answer, or without one to the second request
    for late in [false, true] {
        let answered = Mutex::new(BTreeSet::new());
        let exporter = Exporter::start(move |seen, stream| {
            let first = answered.lock().unwrap().insert(seen.connection);
            first && stream.write_all(OK.as_bytes()).is_ok() && late
        });
        let setup = Setup::start(Vpn::start(KEY, None));
        setup.device('a', exporter.addr);
        for count in 1..=3 {
            assert_eq!(setup.scrape(&target('a')), ("HTTP/1.1 200 OK".to_owned(), "up 1\n".to_owned()), "{late}");
            assert_eq!(setup.handshakes(), count, "{late}");
        }
    }
}

/// As HAProxy says before it closes a connection that idles.
#[test]
fn a_kept_tunnel_on_which_bytes_came_fails_no_scrape() {
    let (idle, is_told) = mpsc::channel();
    let idle = Mutex::new(idle);
    let exporter = Exporter::start(move |_, stream| {
        stream.write_all(OK.as_bytes()).expect("a scrape");
        let (mut stream, idle) = (stream.try_clone().expect("a socket"), idle.lock().unwrap().clone());
        thread::spawn(move || {
            thread::sleep(CHECK_HOLDS); // the answer has passed by then
            let _ = stream.write_all(b"HTTP/1.1 408 Request Time-out\r\nConnection: close\r\n\r\n");
            let _ = stream.shutdown(Shutdown::Write);
            // The VPN closes once it has passed that on.
            let _ = stream.read_to_end(&mut Vec::new());
            idle.send(())
        });
        true
    });
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device('a', exporter.addr);
    for count in 1..=2 {
        assert_eq!(setup.scrape(&target('a')), ("HTTP/1.1 200 OK".to_owned(), "up 1\n".to_owned()), "{count}");
        is_told.recv_timeout(PATIENCE).unwrap();
    }
    assert_eq!(setup.handshakes(), 2);
}

#[test]
fn it_is_no_open_proxy() {
    let exporter = Exporter::saying(OK);
    let setup = Setup::start(Vpn::start(KEY, None));
    for letter in ['a', 'd'] {
        setup.vpn.device(&uuid(letter), |device| device.ports.extend([9100, 9101, 22222].map(|p| (p, exporter.addr))));
    }
    setup.replace(&groups(&[target('a'), format!("{}.balena:22222", uuid('a')), "192.0.2.1:80".to_owned()]));
    let (a, d, other) = (target('a'), target('d'), format!("{}.balena:9101", uuid('a')));
    let not_target = |target: &str| format!("refused: {target} is no target in the target file");
    let ssh = "refused: port 22222 is the SSH of the host".to_owned();
    let (methods, urls) =
        ("refused: GET and CONNECT only".to_owned(), "refused: GET of http URLs and CONNECT only".to_owned());
    for (request, reason) in [
        (format!("GET http://{d}/metrics"), not_target(&d)),
        (format!("GET http://{other}/metrics"), not_target(&other)),
        (format!("GET http://{}.balena/metrics", uuid('a')), not_target(&format!("{}.balena:80", uuid('a')))),
        (format!("GET http://x@{a}/metrics"), not_target(&format!("x@{a}"))),
        (format!("GET http://{}.balena:22222/metrics", uuid('a')), ssh.clone()),
        (format!("CONNECT {}.balena:022222", uuid('a')), ssh.clone()),
        (format!("CONNECT {}.balena:22222", uuid('a')), ssh),
        (format!("CONNECT {d}"), not_target(&d)),
        (format!("CONNECT {other}"), not_target(&other)),
        ("CONNECT example.com:443".to_owned(), not_target("example.com:443")),
        ("GET http://169.254.169.254/latest".to_owned(), not_target("169.254.169.254:80")),
        (format!("GET https://{a}/metrics"), urls),
        (format!("POST http://{a}/metrics"), methods.clone()),
        (format!("HEAD http://{a}/metrics"), methods.clone()),
        (format!("OPTIONS http://{a}/metrics"), methods.clone()),
        ("POST /metrics".to_owned(), methods.clone()),
        ("OPTIONS *".to_owned(), methods),
    ] {
        let answer =
            setup.send(&format!("{request} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"));
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{request}: {answer}"));
        assert_eq!(head.lines().next(), Some(&*format!("HTTP/1.1 403 {reason}")), "{request}");
        let body_of = |reason: String| if request.starts_with("HEAD") { String::new() } else { reason + "\n" };
        assert_eq!(body, body_of(reason), "{request}");
    }
    assert_eq!((setup.vpn.requests(), exporter.seen()), (vec![], vec![]));
    assert_eq!(setup.scrape(&a).0, "HTTP/1.1 200 OK");
    assert_eq!(setup.scrape(&a.to_uppercase()).0, "HTTP/1.1 200 OK", "names have no case");
}

#[test]
fn the_list_is_the_one_of_now() {
    let exporter = Exporter::saying(OK);
    let setup = Setup::start(Vpn::start(KEY, None));
    ['a', 'b', 'd'].iter().for_each(|letter| setup.device(*letter, exporter.addr));
    let (goes, not) = ("HTTP/1.1 200 OK".to_owned(), |letter| {
        format!("HTTP/1.1 403 refused: {} is no target in the target file", target(letter))
    });
    assert_eq!(['a', 'b', 'd'].map(|letter| setup.scrape(&target(letter)).0), [goes.clone(), goes.clone(), not('d')]);
    setup.replace(&groups(&['d', 'b'].map(target)));
    let after = [not('a'), goes.clone(), goes];
    assert_eq!(['a', 'b', 'd'].map(|letter| setup.scrape(&target(letter)).0), after);
    // What cannot be read, or has nothing in it, leaves the last one.
    let all = || ['a', 'b', 'd'].map(|letter| setup.scrape(&target(letter)).0);
    for text in ["", "[", "[]", "{}", "[{\"targets\":[7]}]", "\u{feff}[]", "[{\"targets\":[],\"labels\":{}}]"] {
        write(&setup.sidecar, text);
        thread::sleep(CHECK_HOLDS);
        assert_eq!(all(), after, "{text:?}");
    }
    fs::remove_file(setup.sidecar.path("balena.json")).unwrap();
    assert_eq!(all(), after);
    fs::create_dir(setup.sidecar.path("balena.json")).unwrap();
    assert_eq!(all(), after);
    fs::remove_dir(setup.sidecar.path("balena.json")).unwrap();
    // nobody ever writes into this pipe
    assert!(Command::new("mkfifo").arg(setup.sidecar.path("balena.json")).status().unwrap().success());
    assert_eq!(all(), after);
    setup.running.wait_for_lines("The list that was read before stays, with 2 targets", 10);
    fs::remove_file(setup.sidecar.path("balena.json")).unwrap();
    setup.replace(&groups(&[target('a')]));
    assert_eq!(setup.scrape(&target('a')).0, "HTTP/1.1 200 OK");
    assert_eq!(setup.metric("baletheus_tunnel_targets"), [(String::new(), 1.0)].into());
}

/// A program of 32 bits has no room for such a file.
#[test]
fn a_list_above_the_limit_is_not_read() {
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device('a', Exporter::saying(OK).addr);
    assert_eq!(setup.scrape(&target('a')).0, "HTTP/1.1 200 OK");
    let sparse = fs::File::create(setup.sidecar.path("large")).unwrap();
    sparse.set_len((1 << 30) + 1).unwrap();
    fs::rename(setup.sidecar.path("large"), setup.sidecar.path("balena.json")).unwrap();
    thread::sleep(CHECK_HOLDS);
    assert_eq!(setup.scrape(&target('a')).0, "HTTP/1.1 200 OK");
    let line = setup.running.wait_for("balena.json is too large");
    assert!(line.contains("The list that was read before stays, with "), "{line}");
}

/// Prometheus ends scrapes of changed targets just when the list changes.
#[test]
fn a_scrape_that_is_given_up_leaves_the_list_to_the_next() {
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device('d', Exporter::saying(OK).addr);
    let many = (0..20_000).map(|number| format!("{number:032x}.balena:9100"));
    write(&setup.sidecar, &groups(&many.chain([target('d')]).collect::<Vec<_>>()));
    // it reads this as soon as it is asked, and is left in the midst of it
    for _ in 0..20 {
        let mut stream = setup.connect();
        stream.write_all(format!("GET http://{0}/ HTTP/1.1\r\nHost: {0}\r\n\r\n", target('d')).as_bytes()).unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    while setup.scrape(&target('d')).0 != "HTTP/1.1 200 OK" {
        assert!(Instant::now() < deadline, "{}", setup.running.log().join("\n"));
    }
    assert_eq!(setup.metric("baletheus_tunnel_targets"), [(String::new(), 20_001.0)].into());
}

#[test]
fn without_a_list_all_is_refused() {
    let sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY);
    let vpn = Vpn::start(KEY, None);
    let (running, url) = sidecar.tunnel(&vpn.url());
    running.wait_for("balena.json cannot be read: No such file or directory (os error 2); is it the file that baletheus writes (--sd-file, SD_FILE_PATH)? Every scrape is refused until it has targets");
    let setup = Setup { vpn, url, running, sidecar };
    setup.expect(&target('a'), 403, &format!("refused: {} is no target in the target file", target('a')));
    setup.device('a', Exporter::saying(OK).addr);
    setup.replace(&groups(&[target('a')]));
    assert_eq!(setup.scrape(&target('a')).0, "HTTP/1.1 200 OK");
    setup.running.wait_for("1 target in balena.json");
}

#[test]
fn a_device_that_is_not_connected_is_not_asked_for_at_each_scrape() {
    const OFFLINE: &str = "device not connected to the VPN";
    let setup = Setup::start(Vpn::start(KEY, None));
    let (a, other_port) = (target('a'), format!("{}.balena:8080", uuid('a')));
    let with_another = [a.clone(), other_port.clone(), target('b')];
    setup.replace(&groups(&with_another));
    // It closes each connection, so that no tunnel is kept.
    let exporter = Exporter::start(|_, stream| stream.write_all(OK.as_bytes()).is_err());
    setup.device('b', exporter.addr);
    setup.vpn.device(&uuid('a'), |device| device.offline = true);
    // Two intervals of the fast target in one of the slow one. Which of the two was refused first makes no difference.
    for order in [[&a, &other_port, &a, &a, &other_port, &a], [&other_port, &a, &a, &other_port, &a, &a]] {
        let before = setup.handshakes();
        for target in order {
            setup.expect(target, 502, OFFLINE);
        }
        assert_eq!(setup.handshakes() - before, 4, "balena is asked at each scrape of the fast target only");
        // It comes back: the next scrape of each target succeeds.
        setup.device('a', exporter.addr);
        setup.vpn.device(&uuid('a'), |device| device.ports.extend([(8080, exporter.addr)]));
        for target in [&a, &other_port] {
            assert_eq!(setup.scrape(target).0, "HTTP/1.1 200 OK");
        }
        // and is lost again
        setup.vpn.device(&uuid('a'), |device| device.offline = true);
    }
    assert_eq!(setup.scrape(&target('b')).0, "HTTP/1.1 200 OK", "no other device is affected");
    assert_eq!(setup.metric("baletheus_tunnel_remembered_total"), [(String::new(), 4.0)].into());

    // A device that discovery lists again is asked for at once.
    setup.vpn.device(&uuid('c'), |device| device.offline = true);
    setup.replace(&groups(&['a', 'b', 'c'].map(target)));
    setup.expect(&target('c'), 502, OFFLINE);
    setup.replace(&groups(&with_another));
    assert_eq!(setup.scrape(&target('c')).0.split(' ').nth(1), Some("403"));
    setup.device('c', exporter.addr);
    setup.replace(&groups(&['a', 'b', 'c'].map(target)));
    assert_eq!(setup.scrape(&target('c')).0, "HTTP/1.1 200 OK");
}

#[test]
fn each_failure_is_told() {
    let setup = Setup::start(Vpn::start(KEY, None));
    let a = target('a');
    setup.expect(&a, 502, "refused: no access, unknown device, or balena's API busy");
    setup.vpn.device(&uuid('b'), |device| device.offline = true);
    setup.expect(&target('b'), 502, "device not connected to the VPN");
    setup.vpn.device(&uuid('a'), |_| ());
    setup.expect(&a, 502, "port 9100 closed or device unreachable");
    setup.device('a', Exporter::start(|_, _| false).addr);
    setup.expect(&a, 502, "broke off: the connection closes before the answer is complete");
    setup.device('a', Exporter::saying("SSH-2.0-OpenSSH_9.2\r\n").addr);
    setup.expect(&a, 502, "not HTTP: invalid HTTP version parsed");
    // Whoever speaks first: the server does, as SSH and SMTP do.
    let early = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    setup.device('a', early.local_addr().unwrap());
    thread::spawn(move || {
        let mut open = Vec::new();
        for mut stream in early.incoming().flatten() {
            stream.write_all(b"220 mail.example.com ESMTP\r\n").unwrap();
            open.push(stream);
        }
    });
    for _ in 0..20 {
        setup.expect(&a, 502, "not HTTP: invalid HTTP version parsed");
    }
    // an answer of the exporter's own, whatever it is
    setup.device('a', Exporter::saying("HTTP/1.1 503 Warming up\r\nContent-Length: 3\r\n\r\nyet").addr);
    assert_eq!(setup.scrape(&a), ("HTTP/1.1 503 Warming up".to_owned(), "yet".to_owned()));
    for (result, expected) in [("no_access", 1.0), ("not_connected", 1.0), ("port_closed", 1.0), ("ok", 1.0)] {
        let counts = setup.metric("baletheus_tunnel_scrapes_total");
        assert_eq!(counts.get(&format!("{{result=\"{result}\"}}")), Some(&expected), "{counts:?}");
    }
    for line in setup.running.log() {
        assert!(!line.contains(KEY), "{line}");
    }
}

/// `baletheus_tunnel_target_failure` names what Prometheus keeps to its own API.
#[test]
fn each_target_that_fails_has_a_series() {
    let setup = Setup::start(Vpn::start(KEY, None));
    let page = Exporter::start(|seen, stream| {
        let warming = "HTTP/1.1 503 Warming up\r\nContent-Length: 3\r\n\r\nyet";
        let answer = if seen.line.contains("/app") { warming } else { OK };
        stream.write_all(answer.as_bytes()).is_ok()
    });
    setup.device('a', page.addr);
    setup.vpn.device(&uuid('b'), |device| device.offline = true);
    setup.vpn.device(&uuid('c'), |_| ());
    let group = |letter: char, labels: &[(&str, &str)]| {
        let labels: BTreeMap<_, _> = labels.iter().copied().chain([("fleet", "x/y")]).collect();
        let mut group = json!({"targets": [target(letter).to_uppercase()], "labels": labels});
        group["labels"]["uuid"] = json!(uuid(letter));
        group
    };
    let path = "__metrics_path__";
    let all = [
        group('a', &[("job", "node")]),
        group('a', &[("job", "app"), (path, "/app")]),
        group('a', &[("job", "twin"), (path, "/app/1")]),
        group('a', &[("job", "twin"), (path, "/app/2")]),
        group('b', &[("instance", "a \"name\"")]),
        group('c', &[("job", "safe"), ("__scheme__", "https")]),
    ];
    setup.replace(&json!(all).to_string());
    let get = |letter, path: &str| {
        setup.send(&format!("GET http://{}{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", target(letter)))
    };
    let scrape_all = || {
        for path in ["/metrics", "/app?x=1", "/app/1", "/app/2", "/app/3"] {
            get('a', path);
        }
        get('b', "/elsewhere");
        let within = "GET / HTTP/1.1\r\n\r\n";
        setup.send(&format!("CONNECT {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n{within}", target('c')));
    };
    scrape_all();
    get('d', "/metrics"); // no target
    let series = |letter: char, job: &str, instance: &str, reason: &str| {
        (format!("{{instance=\"{instance}\",job=\"{job}\",reason=\"{reason}\",uuid=\"{}\"}}", uuid(letter)), 1.0)
    };
    let [a, c] = ['a', 'c'].map(|letter| target(letter).to_uppercase());
    let expected = [
        series('a', "app", &a, "http"),
        series('a', "twin", &a, "http"),
        series('b', "", r#"a \"name\""#, "not_connected"),
        series('c', "safe", &c, "port_closed"),
    ];
    let failures = || setup.metric("baletheus_tunnel_target_failure");
    assert_eq!(failures(), expected.clone().into());
    // The same for people, in the words of `check`.
    let page = setup.send("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(page.contains("6 exporters in the target file; the last scrape of 5 failed\n"), "{page}");
    for line in [format!("http: app {a}\n"), "not_connected:  a \"name\"\n".into(), format!("port_closed: safe {c}\n")]
    {
        assert!(page.contains(&line), "{line}: {page}");
    }
    // Another reason takes the place of the first one, and a target that leaves the list has none.
    setup.vpn.device(&uuid('b'), |device| *device = Device::default());
    setup.replace(&json!(all[1..]).to_string());
    setup.replace(&json!(all[2..]).to_string());
    scrape_all();
    let [_, twin, _, safe] = expected;
    let expected = [twin.clone(), series('b', "", r#"a \"name\""#, "port_closed"), safe.clone()];
    assert_eq!(failures(), expected.into());
    // whether anything is scraped or not
    setup.replace(&json!([&all[2], &all[3], &all[5]]).to_string());
    assert_eq!(failures(), [twin, safe].into());
    // and a success ends it
    for letter in ['b', 'c'] {
        setup.device(letter, Exporter::start(|_, stream| stream.write_all(OK.as_bytes()).is_err()).addr);
    }
    setup.replace(&json!(all[4..]).to_string());
    scrape_all();
    assert_eq!(failures(), [].into());
    // A target that leaves the list during its scrape has none either.
    let (asked, was_asked) = mpsc::channel();
    let (left, has_left) = mpsc::channel();
    let (asked, has_left) = (Mutex::new(asked), Mutex::new(has_left));
    let slow = Exporter::start(move |_, _| {
        asked.lock().unwrap().send(()).unwrap();
        has_left.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        false
    });
    setup.device('d', slow.addr);
    setup.replace(&json!([&all[4], group('d', &[])]).to_string());
    thread::scope(|scope| {
        scope.spawn(|| get('d', "/metrics"));
        was_asked.recv_timeout(PATIENCE).unwrap();
        setup.replace(&json!(all[4..5]).to_string());
        assert_eq!(failures(), [].into());
        left.send(()).unwrap();
    });
    assert_eq!(failures(), [].into());
}

#[test]
fn an_answer_beyond_64_mib_is_not_whole() {
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device(
        'a',
        Exporter::start(|_, stream| {
            let part = vec![b'a'; 1 << 20];
            let head = format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n", 65 << 20);
            stream.write_all(head.as_bytes()).is_ok() && (0..65).all(|_| stream.write_all(&part).is_ok())
        })
        .addr,
    );
    let (_, body) = setup.scrape(&target('a'));
    assert!(body.len() <= 64 << 20, "{} bytes", body.len());
    setup.wait_for_metric("baletheus_tunnel_scrapes_total", "{result=\"too_large\"}", 1.0);
}

#[test]
fn an_answer_that_breaks_off_is_not_whole() {
    let exporter = Exporter::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 99\r\n\r\nup 1\n");
        false
    });
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device('a', exporter.addr);
    let answer = setup.send(&format!("GET http://{0}/metrics HTTP/1.1\r\nHost: {0}\r\n\r\n", target('a')));
    assert!(answer.contains("content-length: 99\r\n") && answer.ends_with("\r\n\r\nup 1\n"), "{answer}");
    setup.wait_for_metric("baletheus_tunnel_scrapes_total", "{result=\"broke_off\"}", 1.0);
    // and its tunnel is not used again
    setup.scrape(&target('a'));
    assert_eq!(setup.handshakes(), 2);
}

/// Prometheus says how long it waits, and the answer comes before that.
#[test]
fn silence_ends_before_the_scrape_does() {
    let silent = Exporter::start(|_, _| {
        thread::sleep(PATIENCE);
        false
    });
    let half = Exporter::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nup 1\n");
        thread::sleep(PATIENCE);
        false
    });
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device('a', silent.addr);
    setup.vpn.device(&uuid('b'), |device| device.silent = true);
    setup.device('c', half.addr);
    let ask = |letter, header: &str| {
        let target = target(letter);
        setup.send(&format!(
            "GET http://{target}/metrics HTTP/1.1\r\nHost: {target}\r\n{header}Connection: close\r\n\r\n"
        ))
    };
    let header = |timeout: &str| format!("X-Prometheus-Scrape-Timeout-Seconds: {timeout}\r\n");
    thread::scope(|scope| {
        for letter in ['a', 'b'] {
            // 10 s is Prometheus' own, and 9 s what counts where nothing is said
            for (header, told) in [(header("6"), "5.4"), (header("8.5"), "7.65"), (String::new(), "9")] {
                scope.spawn(move || {
                    let answer = ask(letter, &header);
                    assert!(
                        answer.starts_with(&format!("HTTP/1.1 504 no answer in {told} s\r\n")),
                        "{letter}: {answer}"
                    );
                });
            }
        }
        scope.spawn(|| {
            let answer = ask('c', &header("6"));
            assert!(answer.ends_with("\r\n\r\nup 1\n"), "{answer}");
        });
    });
    setup.wait_for_metric("baletheus_tunnel_scrapes_total", "{result=\"timeout\"}", 7.0);
    // What timed out is closed, and was never used again.
    setup.wait_for_metric("baletheus_tunnel_open", "", 0.0);
    assert_eq!(setup.handshakes(), 7);
}

#[test]
fn what_hangs_holds_up_nothing_else() {
    const HANG: usize = 300;
    let (exporter, hung) = (Exporter::saying(OK), Arc::new(AtomicUsize::new(0)));
    let vpn = Vpn::start_with(KEY, {
        let (addr, hung) = (exporter.addr, hung.clone());
        move |uuid| {
            let silent = uuid.ends_with('f');
            hung.fetch_add(usize::from(silent), Ordering::Relaxed);
            Some(Device { silent, offline: false, ports: [(9100, addr)].into() })
        }
    });
    let setup = Setup::start(vpn);
    let name = |number: usize, end: char| format!("{number:031x}{end}.balena:9100");
    let all = (0..HANG).flat_map(|number| [name(number, 'f'), name(number, '0')]).collect::<Vec<_>>();
    setup.replace(&groups(&all));
    let mut hanging: Vec<_> = (0..HANG).map(|_| setup.connect()).collect();
    for (number, stream) in hanging.iter_mut().enumerate() {
        let target = name(number, 'f');
        let head = format!(
            "GET http://{target}/metrics HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 600\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    while hung.load(Ordering::Relaxed) < HANG {
        assert!(Instant::now() < deadline, "{hung:?} hang");
        thread::sleep(Duration::from_millis(20));
    }
    for number in 0..HANG {
        assert_eq!(setup.scrape(&name(number, '0')).0, "HTTP/1.1 200 OK");
    }
    setup.wait_for_metric("baletheus_tunnel_scrapes_total", "{result=\"ok\"}", HANG as f64);
}

/// The tunnels at once are a third of the files that the process may open, less 64.
#[test]
fn there_is_a_place_for_as_many_tunnels_as_there_may_be() {
    const PLACES: usize = 32;
    let exporter = Exporter::saying(OK);
    let vpn = Vpn::start_with(KEY, move |uuid| {
        let silent = uuid.ends_with('f');
        Some(Device { silent, offline: false, ports: [(9100, exporter.addr)].into() })
    });
    let name = |number: usize, end: char| format!("{number:031x}{end}.balena:9100");
    let sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY);
    write(
        &sidecar,
        &groups(&(0..=PLACES).flat_map(|number| [name(number, '0'), name(number, 'f')]).collect::<Vec<_>>()),
    );
    let (running, url) = sidecar.tunnel_within(64 + 3 * PLACES, &vpn.url());
    running.wait_for(&format!("{PLACES} at once"));
    let setup = Setup { vpn, url, running, sidecar };
    let good = |number| assert_eq!(setup.scrape(&name(number, '0')).0, "HTTP/1.1 200 OK", "{number}");
    (0..=PLACES).for_each(good);
    assert_eq!(setup.handshakes(), PLACES + 1);
    // The last but one was used last, and made room for the last: in the next turn all others have their tunnels.
    (0..PLACES - 1).chain([PLACES]).for_each(good);
    assert_eq!(setup.handshakes(), PLACES + 1);
    good(PLACES - 1);
    assert_eq!(setup.handshakes(), PLACES + 2);
    // Where all are in use there is none for one more.
    let hanging: Vec<_> = (0..PLACES).map(|_| setup.connect()).collect();
    for (number, mut stream) in hanging.iter().enumerate() {
        let target = name(number, 'f');
        let head = "HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 600";
        stream.write_all(format!("GET http://{target}/ {head}\r\n\r\n").as_bytes()).unwrap();
    }
    setup.wait_for_metric("baletheus_tunnel_handshakes_total", "", (2 * PLACES + 2) as f64);
    setup.expect(&name(PLACES, '0'), 503, "too many scrapes at once");
    drop(hanging);
    setup.wait_for_metric("baletheus_tunnel_open", "", 0.0);
    good(1);
}

#[test]
fn https_targets_are_joined() {
    let authority = Authority::generate();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let name = format!("{}.balena", uuid('a'));
    let config = authority.server(&[&name]);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream.unwrap());
            thread::spawn(move || {
                let mut lines = BufReader::new(&mut stream).lines().map_while(Result::ok);
                while lines.next().is_some_and(|line| !line.is_empty()) {}
                drop(lines);
                stream.write_all(OK.as_bytes()).and_then(|()| stream.flush()).unwrap();
                stream.read_to_end(&mut Vec::new())
            });
        }
    });
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.device('a', addr);
    // CONNECT would hide what is sent to a plain target
    let refused = setup.send(&format!("CONNECT {0} HTTP/1.1\r\nHost: {0}\r\nConnection: close\r\n\r\n", target('a')));
    let expected =
        "HTTP/1.1 403 refused: CONNECT is for targets with the scheme https only (tag prometheus.io/scheme)\r\n";
    assert!(refused.starts_with(expected), "{refused}");
    let groups = ['a', 'b'].map(|letter| json!({"targets": [target(letter)], "labels": {"__scheme__": "https"}}));
    setup.replace(&json!(groups).to_string());
    let mut stream = setup.connect();
    stream.write_all(format!("CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n\r\n", target('a')).as_bytes()).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    assert!(head.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", head.escape_ascii());
    let mut roots = RootCertStore::empty();
    let pem = authority.pem();
    roots.add_parsable_certificates(rustls::pki_types::pem::PemObject::pem_slice_iter(pem.as_bytes()).flatten());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
    let client = ClientConnection::new(config, ServerName::try_from(name).unwrap()).unwrap();
    let mut tls = StreamOwned::new(client, stream);
    tls.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = vec![0; OK.len()];
    tls.read_exact(&mut answer).unwrap();
    assert_eq!(String::from_utf8(answer).unwrap(), OK);
    setup.wait_for_metric("baletheus_tunnel_open", "", 1.0);
    drop(tls);
    setup.wait_for_metric("baletheus_tunnel_open", "", 0.0);
    // A refused CONNECT has its reason in the status line, as Prometheus shows it.
    setup.vpn.device(&uuid('b'), |device| device.offline = true);
    let answer = setup.send(&format!("CONNECT {0} HTTP/1.1\r\nHost: {0}\r\nConnection: close\r\n\r\n", target('b')));
    assert!(answer.starts_with("HTTP/1.1 502 device not connected to the VPN\r\n"), "{answer}");
    assert_eq!(
        setup.results(),
        [
            ("{result=\"not_connected\"}".to_owned(), 1.0),
            ("{result=\"not_target\"}".to_owned(), 1.0),
            ("{result=\"ok\"}".to_owned(), 1.0)
        ]
        .into()
    );
}

#[test]
fn the_way_to_the_tunnel_host_is_tls_that_is_verified() {
    // many records, and larger than any buffer
    let page: String = (0..200_000).map(|number| format!("up {number}\n")).collect();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{page}", page.len());
    let exporter = Exporter::start(move |_, stream| stream.write_all(answer.as_bytes()).is_ok());
    let authority = Authority::generate();
    let start = |trusted: bool| {
        let vpn = Vpn::start(KEY, Some(authority.server(&["localhost"])));
        let mut sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY);
        if trusted {
            fs::write(sidecar.path("ca.pem"), authority.pem()).unwrap();
            sidecar = sidecar.env("BALENA_CA_FILE", "ca.pem");
        }
        write(&sidecar, &groups(&[target('a')]));
        let (running, url) = sidecar.tunnel(&format!("https://localhost:{}", vpn.addr.port()));
        let setup = Setup { vpn, url, running, sidecar };
        setup.device('a', exporter.addr);
        setup
    };
    let setup = start(true);
    for _ in 0..3 {
        let (line, body) = setup.scrape(&target('a'));
        assert_eq!(line, "HTTP/1.1 200 OK");
        assert!(body == page, "{} bytes instead of {}", body.len(), page.len());
    }
    assert_eq!(setup.handshakes(), 1);
    let setup = start(false);
    let (line, _) = setup.scrape(&target('a'));
    assert!(line.starts_with("HTTP/1.1 502 tunnel host not reachable: TLS: invalid peer certificate"), "{line}");
    assert_eq!(setup.handshakes(), 0);
}

#[test]
fn a_lost_tunnel_host_is_told_once() {
    let sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY);
    write(&sidecar, &groups(&['a', 'b'].map(target)));
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (running, url) = sidecar.tunnel(&format!("http://{free}"));
    let mut setup = Setup { vpn: Vpn::start(KEY, None), url, running, sidecar };
    for letter in ['a', 'b', 'a'] {
        setup.expect(&target(letter), 502, "tunnel host not reachable: connection refused");
    }
    let warning = setup.running.wait_for("WARN  every scrape fails: tunnel host not reachable");
    assert!(warning.contains("; is --tunnel-url (TUNNEL_URL) right"), "{warning}");
    setup.vpn = Vpn::start_at(free, KEY);
    setup.device('b', Exporter::saying(OK).addr);
    assert_eq!(setup.scrape(&target('b')).0, "HTTP/1.1 200 OK");
    setup.running.wait_for("INFO  scrapes succeed again (before: no_tunnel)");
    let log = setup.running.log();
    assert_eq!(log.iter().filter(|line| line.contains("every scrape fails")).count(), 1, "{log:?}");
}

#[test]
fn a_rotated_key_needs_no_restart() {
    let exporter = Exporter::saying(OK);
    let sidecar = Sidecar::new(binary::path()).env("API_KEY_FILE", "key");
    fs::write(sidecar.path("key"), "an-old-key").unwrap();
    let setup = Setup::with(Vpn::start(KEY, None), sidecar);
    setup.device('a', exporter.addr);
    setup.expect(&target('a'), 502, "refused: no access, unknown device, or balena's API busy");
    fs::write(setup.sidecar.path("key"), "").unwrap();
    let trouble = "; the key file key is empty, so the old key stays";
    setup.expect(&target('a'), 502, &format!("refused: no access, unknown device, or balena's API busy{trouble}"));
    fs::write(setup.sidecar.path("key"), KEY).unwrap();
    // to all that ask at once: one of them reads the file, and the others ask with what it found
    thread::scope(|scope| {
        let scrapes: Vec<_> = (0..8).map(|_| scope.spawn(|| setup.scrape(&target('a')).0)).collect();
        for scrape in scrapes {
            assert_eq!(scrape.join().unwrap(), "HTTP/1.1 200 OK");
        }
    });
}

#[test]
fn it_ends_when_it_is_told_to() {
    for signal in ["TERM", "INT"] {
        let setup = Setup::start(Vpn::start(KEY, None));
        let answer = setup.send("GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nhealthy\n"), "{answer}");
        let head = setup.send("HEAD /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        let answer = setup.send("GET /targets HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\n"), "{answer}");
        let mut command = setup.sidecar.command();
        command.args(["health", &setup.url]);
        assert!(finish(command).status.success());
        setup.running.signal("HUP");
        setup.running.signal(signal);
        let (status, log) = setup.running.wait();
        assert!(status.success(), "{status}");
        assert!(log.last().unwrap().ends_with(&format!("stopped by SIG{signal}")), "{log:?}");
    }
}

/// As the status endpoint: the page of another site cannot ask by a name of its own.
#[test]
fn its_pages_are_for_known_hosts() {
    let sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY).env("STATUS_HOSTS", "tunnel.example.org");
    let setup = Setup::with(Vpn::start(KEY, None), sidecar);
    for (host, status) in [
        ("127.0.0.1:9798", "200 OK"),
        ("tunnel:9798", "200 OK"),
        ("[::1]:9798", "200 OK"),
        ("tunnel.example.org", "200 OK"),
        ("attacker.example", "403 Forbidden"),
    ] {
        for path in ["/metrics", "/-/healthy"] {
            let answer = setup.send(&format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"));
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{host}{path}: {answer}");
        }
    }
}

#[test]
fn configuration_errors_come_all_at_once() {
    let sidecar =
        Sidecar::new(binary::path()).env("TUNNEL_URL", "ftp://x").env("LOG_LEVEL", "loud").env("FLEET", "1/2/3");
    let mut command = sidecar.command();
    command.args(["tunnel", "--listen", "9798"]);
    let output = finish(command);
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8(output.stderr).unwrap();
    for what in ["API_KEY is not set", "TUNNEL_URL is \"ftp://x\"", "LOG_LEVEL is \"loud\"", "--listen is \"9798\""] {
        assert!(told.contains(what), "{what}: {told}");
    }
    assert!(!told.contains("FLEET"), "not an option of the tunnel's: {told}");
}

#[test]
fn the_readme_has_every_metric() {
    let setup = Setup::start(Vpn::start(KEY, None));
    setup.scrape(&target('a')); // fails: there is a series for each failure only
    let text = setup.send("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let helps = text.lines().filter_map(|line| line.strip_prefix("# HELP baletheus_tunnel_")?.split_once(' '));
    let table: Vec<_> =
        helps.map(|(name, help)| format!("| `baletheus_tunnel_{name}` | {} |", help.trim_end_matches('.'))).collect();
    let document = include_str!("../../docs/metrics.md");
    let found = document.split_once("<!-- tunnel metrics:").expect("a mark").1.split_once("-->\n").unwrap().1;
    let found: Vec<_> = found.lines().skip(2).take_while(|line| !line.is_empty()).collect();
    assert_eq!(found, table, "the table in docs/metrics.md has to be:\n{}\n", table.join("\n"));
}
