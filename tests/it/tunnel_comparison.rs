//! Through the tunnel as without it: real Prometheus scrapes each exporter directly and through the tunnel, and stores the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::binary;
use crate::support::cloud::KEY;
use crate::support::prometheus::{NodeExporter, Prometheus};
use crate::support::sidecar::Sidecar;
use crate::support::tls::Authority;
use crate::support::vpn::{Device, Vpn};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use socket2::SockRef;

/// Exporters that are scraped directly and not through the tunnel, and the row of docs/prometheus.md that has the reason.
const DIFFERENCES: [(&str, &str); 4] = [
    ("content type of 300 bytes", "a `Content-Type` above 256 bytes"),
    ("empty length", "an empty `Content-Length`"),
    ("head of 100 KB", "a head above 64 KiB or 1,024 headers"),
    ("2,000 headers", "a head above 64 KiB or 1,024 headers"),
];
/// Scrapes of each target before the comparison.
const SCRAPES: f64 = 3.0;
const TIMEOUT: Duration = Duration::from_secs(240);
const METRICS: &str = "# TYPE m gauge\nm{a=\"1\"} 1\nm{a=\"2\"} 2.5\n";
const TEXT: &str = "text/plain; version=0.0.4";

/// Answers a request, whose number in all and in its connection it gets; false closes the connection.
type Answer = dyn Fn(&mut TcpStream, &str, (usize, usize)) -> bool + Send + Sync;
type Make = fn() -> Box<Answer>;

/// A listener, and the number of requests that it has had.
fn serve(answer: Box<Answer>) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (addr, requests) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let (answer, count): (Arc<Answer>, _) = (answer.into(), requests.clone());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (mut stream, answer, count) = (stream, answer.clone(), count.clone());
            thread::spawn(move || {
                for number in 0.. {
                    let lines = BufReader::with_capacity(1, &mut stream).lines().map_while(Result::ok);
                    let head: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
                    if head.is_empty() {
                        return;
                    }
                    let total = count.fetch_add(1, Ordering::Relaxed);
                    if !answer(&mut stream, &head.join("\n"), (total, number)) {
                        return;
                    }
                }
            });
        }
    });
    (addr, requests)
}

fn ok(headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\nContent-Type: {TEXT}\r\n{headers}Content-Length: {length}\r\n\r\n{body}").into_bytes()
}

fn with_type(kind: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

fn raw(head: &str, body: &str) -> Vec<u8> {
    format!("{head}\r\n\r\n{body}").replace("TEXT", &format!("Content-Type: {TEXT}")).into_bytes()
}

fn gzipped(headers: &str) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(METRICS.as_bytes()).unwrap();
    let body = gzip.finish().unwrap();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {TEXT}\r\nContent-Encoding: gzip\r\n{headers}");
    match headers {
        "" => [format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes(), &body].concat(),
        _ => [format!("{head}\r\n{:x}\r\n", body.len()).as_bytes(), &body, b"\r\n0\r\n\r\n"].concat(),
    }
}

/// A native histogram with two buckets, as `prometheus/client_model` defines the messages.
fn protobuf() -> Vec<u8> {
    let mut histogram = vec![0x08, 3, 0x11];
    histogram.extend(6_f64.to_le_bytes());
    histogram.extend([0x28, 0, 0x31]);
    histogram.extend(1e-128_f64.to_le_bytes());
    histogram.extend([0x38, 0, 0x62, 4, 0x08, 0, 0x10, 2, 0x68, 2, 0x68, 2]);
    let mut metric = vec![0x3a, histogram.len() as u8];
    metric.extend(histogram);
    let mut family = vec![0x0a, 2, b'n', b'h', 0x18, 4, 0x22, metric.len() as u8];
    family.extend(metric);
    [vec![family.len() as u8], family].concat()
}

/// Exporters that send the same bytes to each request, and whether they keep the connection.
fn fixed() -> Vec<(&'static str, Vec<u8>, bool)> {
    let chunks = |extra: &str, end: &str| {
        let head = "HTTP/1.1 200 OK\r\nTEXT\r\nTransfer-Encoding: chunked";
        let half = METRICS.len() / 2;
        let (first, second) = METRICS.split_at(half);
        raw(head, &format!("{:x}{extra}\r\n{first}\r\n{:x}\r\n{second}\r\n{end}", first.len(), second.len()))
    };
    let length = METRICS.len();
    let plain = "HTTP/1.1 200 OK\r\nTEXT";
    let open_metrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let counter = "# TYPE c counter\nc_total 3 # {trace_id=\"x\"} 1\n";
    let many = |number: usize| (0..number).map(|number| format!("X-{number}: 1\r\n")).collect::<String>();
    let huge: String = (0..10_000).fold(String::new(), |mut text, number| {
        let _ = writeln!(text, "huge{{number=\"{number}\",filler=\"{:060}\"}} 1", 0);
        text
    });
    let proto = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited";
    vec![
        ("plain", ok("", METRICS), true),
        ("says that it closes", ok("Connection: close\r\n", METRICS), false),
        ("closes", ok("", METRICS), false),
        ("chunks", chunks("", "0\r\n\r\n"), true),
        ("chunks with an extension", chunks(";x=1", "0\r\n\r\n"), true),
        ("chunks with a trailer", chunks("", "0\r\nX-Trailer: 1\r\n\r\n"), true),
        ("chunks that are cut", chunks("", ""), false),
        ("no length", raw(plain, METRICS), false),
        ("no length, cut in a number", raw(plain, "m 123456"), false),
        ("HTTP/1.0", raw(&format!("HTTP/1.0 200 OK\r\nTEXT\r\nContent-Length: {length}"), METRICS), false),
        ("HTTP/1.0 without a length", raw("HTTP/1.0 200 OK\r\nTEXT", METRICS), false),
        (
            "HTTP/1.0 that is kept",
            raw(&format!("HTTP/1.0 200 OK\r\nTEXT\r\nConnection: keep-alive\r\nContent-Length: {length}"), METRICS),
            true,
        ),
        ("gzip", gzipped(""), true),
        ("gzip in chunks", gzipped("Transfer-Encoding: chunked\r\n"), true),
        ("zstd", ok("Content-Encoding: zstd\r\n", "\u{28}\u{b5}"), true),
        ("no final newline", ok("", METRICS.trim_end()), true),
        ("empty", ok("", ""), true),
        ("no metrics", ok("", "<html>\n"), true),
        ("cut", raw(&format!("{plain}\r\nContent-Length: {}", length + 9), METRICS), false),
        ("huge", ok("", &huge), true),
        ("timestamps", ok("", "m 1 1700000000000\n"), true),
        ("UTF-8 names", ok("", "{\"a.b\",\"c d\"=\"1\"} 1\n"), true),
        ("status without a phrase", raw(&format!("HTTP/1.1 200\r\nTEXT\r\nContent-Length: {length}"), METRICS), true),
        ("503", raw("HTTP/1.1 503 Busy\r\nContent-Length: 0", ""), true),
        ("404", raw("HTTP/1.1 404 Not Found\r\nContent-Length: 0", ""), true),
        ("204", raw("HTTP/1.1 204 No Content", ""), true),
        ("not HTTP", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), false),
        ("early hints", [b"HTTP/1.1 103 Early Hints\r\n\r\n", &*ok("", METRICS)].concat(), true),
        ("header of 20 KB", ok(&format!("X-Long: {}\r\n", "x".repeat(20_000)), METRICS), true),
        ("head of 100 KB", ok(&format!("X-Long: {}\r\n", "x".repeat(100_000)), METRICS), true),
        ("1,000 headers", ok(&many(1_000), METRICS), true),
        ("2,000 headers", ok(&many(2_000), METRICS), true),
        ("folded header", ok("X-Folded: 1,\r\n 2\r\n", METRICS), true),
        ("bare line feeds", raw(&format!("{plain}\r\nX-A: 1\nX-B: 2\r\nContent-Length: {length}"), METRICS), true),
        ("two equal lengths", ok(&format!("Content-Length: {length}\r\n"), METRICS), true),
        ("two lengths", ok(&format!("Content-Length: {}\r\n", length + 1), METRICS), false),
        ("empty length", raw(&format!("{plain}\r\nContent-Length:"), METRICS), false),
        (
            "length and chunks",
            {
                let chunks = String::from_utf8(chunks("", "0\r\n\r\n")).unwrap();
                chunks.replacen("Transfer", "Content-Length: 3\r\nTransfer", 1).into_bytes()
            },
            true,
        ),
        ("Connection names Content-Type", ok("Connection: keep-alive, Content-Type\r\n", METRICS), true),
        (
            "Connection names Content-Encoding",
            {
                let answer = gzipped("");
                let at = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
                [&answer[..at], b"\r\nConnection: Content-Encoding", &answer[at..]].concat()
            },
            true,
        ),
        ("no content type", raw(&format!("HTTP/1.1 200 OK\r\nContent-Length: {length}"), METRICS), true),
        ("content type of a page", with_type("text/html", METRICS.as_bytes()), true),
        ("content type of 300 bytes", with_type(&format!("{TEXT}; x={}", "x".repeat(300)), METRICS.as_bytes()), true),
        ("OpenMetrics", with_type(open_metrics, format!("{counter}# EOF\n").as_bytes()), true),
        ("OpenMetrics without an end", with_type(open_metrics, counter.as_bytes()), true),
        ("protobuf with a native histogram", with_type(proto, &protobuf()), true),
    ]
}

/// Exporters that do more than send.
fn special() -> Vec<(&'static str, Make)> {
    fn send(stream: &mut TcpStream, bytes: &[u8]) -> bool {
        stream.write_all(bytes).is_ok()
    }
    vec![
        ("says what it is asked", || {
            Box::new(|stream, head, _| {
                let asked = ["accept", "accept-encoding", "user-agent", "x-prometheus-scrape-timeout-seconds"];
                let headers = head.lines().filter_map(|line| line.split_once(": "));
                let headers = headers.map(|(name, value)| (name.to_lowercase(), value.replace('"', "'")));
                let body =
                    headers.filter(|(name, _)| asked.contains(&&**name)).fold(String::new(), |mut text, header| {
                        let _ = writeln!(text, "asked{{name=\"{}\",value=\"{}\"}} 1", header.0, header.1);
                        text
                    });
                send(stream, &ok("", &body))
            })
        }),
        ("slow", || {
            Box::new(|stream, _, _| {
                thread::sleep(Duration::from_secs(4));
                send(stream, &ok("", METRICS))
            })
        }),
        ("slow, one at a time", || {
            let busy = AtomicBool::new(false);
            Box::new(move |stream, _, _| {
                if busy.swap(true, Ordering::SeqCst) {
                    return send(stream, b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n");
                }
                thread::sleep(Duration::from_secs(4));
                busy.store(false, Ordering::SeqCst);
                send(stream, &ok("", METRICS))
            })
        }),
        ("redirects", || {
            Box::new(|stream, head, _| match head.starts_with("GET /other ") {
                true => send(stream, &ok("", METRICS)),
                false => send(stream, b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n"),
            })
        }),
        ("closes a kept connection at the request", || {
            Box::new(|stream, _, (_, number)| number == 0 && send(stream, &ok("", METRICS)))
        }),
        ("resets a kept connection at the request", || {
            Box::new(|stream, _, (_, number)| {
                SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).unwrap();
                number == 0 && send(stream, &ok("", METRICS))
            })
        }),
        ("closes within the head of every answer but the first", || {
            Box::new(|stream, _, (total, _)| match total {
                0 => send(stream, &ok("", METRICS)),
                _ => {
                    send(stream, b"HTTP/1.1 200 OK\r\nContent-");
                    false
                }
            })
        }),
    ]
}

struct Exporter {
    name: &'static str,
    scheme: &'static str,
    /// Directly and behind the tunnel, with the requests that came.
    ways: [(SocketAddr, Option<Arc<AtomicUsize>>); 2],
}

fn exporters(node: SocketAddr) -> Vec<Exporter> {
    let plain = |name, make: &dyn Fn() -> Box<Answer>| {
        let ways = [(), ()].map(|()| serve(make())).map(|(addr, requests)| (addr, Some(requests)));
        Exporter { name, scheme: "http", ways }
    };
    let fixed = fixed().into_iter().map(|(name, bytes, keeps)| {
        let bytes: Arc<[u8]> = bytes.into();
        plain(name, &move || {
            let bytes = bytes.clone();
            Box::new(move |stream, _, _| stream.write_all(&bytes).is_ok() && keeps)
        })
    });
    let special = special().into_iter().map(|(name, make)| plain(name, &make));
    let https = Exporter { name: "https with HTTP/2", scheme: "https", ways: [(node, None), (node, None)] };
    fixed.chain(special).chain([https]).collect()
}

fn uuid(number: usize) -> String {
    format!("{number:032x}")
}

/// What Prometheus has of each exporter by one way: `up` and the samples of the last scrape, without what differs by nature.
fn stored(prometheus: &Prometheus, way: &str) -> BTreeMap<String, BTreeSet<String>> {
    let query = format!("query?query=%7Bway%3D%22{way}%22%7D");
    let mut all = BTreeMap::<String, BTreeSet<String>>::new();
    for series in prometheus.api(&query)["result"].as_array().unwrap() {
        let mut labels = series["metric"].as_object().unwrap().clone();
        let name = labels["__name__"].as_str().unwrap_or_default().to_owned();
        if name.ends_with("_seconds") || ["scrape_series_added", "scrape_body_size_bytes"].contains(&&*name) {
            continue;
        }
        for label in ["instance", "way", "job"] {
            labels.remove(label);
        }
        let exporter = labels.remove("exporter").unwrap().as_str().unwrap().to_owned();
        let value = series.get("value").or(series.get("histogram")).map_or(Value::Null, |pair| pair[1].clone());
        all.entry(exporter).or_default().insert(format!("{} {value}", json!(labels)));
    }
    all
}

fn config(exporters: &[Exporter], tunnel: &str, ca: &str) -> String {
    let mut config = "global: {scrape_interval: 10s, scrape_timeout: 10s}\nscrape_configs:\n".to_owned();
    for (way, proxy) in [("direct", String::new()), ("tunnel", format!("  proxy_url: {tunnel}\n"))] {
        let _ = write!(config, "- job_name: {way}\n  tls_config: {{ca_file: {ca}}}\n{proxy}  static_configs:\n");
        for (number, exporter) in exporters.iter().enumerate() {
            let target = match way {
                "direct" => exporter.ways[0].0.to_string(),
                _ => format!("{}.balena:9100", uuid(number)),
            };
            let labels = json!({"way": way, "exporter": exporter.name, "__scheme__": exporter.scheme});
            let _ = writeln!(config, "  - {{targets: ['{target}'], labels: {labels}}}");
        }
    }
    config
}

fn compare(major: u8) {
    let authority = Authority::generate();
    let count = fixed().len() + special().len();
    let (certificate, key) = authority.server_pem(&["127.0.0.1", &format!("{}.balena", uuid(count))]);
    let node = NodeExporter::start_with_tls(&certificate, &key);
    let exporters = exporters(node.addr());
    assert!(exporters.len() >= 40);
    let vpn = Vpn::start(KEY, None);
    let sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY);
    let mut groups = Vec::new();
    for (number, exporter) in exporters.iter().enumerate() {
        vpn.device(&uuid(number), |device| {
            *device = Device { ports: [(9100, exporter.ways[1].0)].into(), ..Device::default() }
        });
        let labels = json!({"__scheme__": exporter.scheme, "uuid": uuid(number)});
        groups.push(json!({"targets": [format!("{}.balena:9100", uuid(number))], "labels": labels}));
    }
    fs::write(sidecar.path("balena.json"), json!(groups).to_string()).unwrap();
    fs::write(sidecar.path("ca.pem"), authority.pem()).unwrap();
    let (running, url) = sidecar.tunnel(&vpn.url());
    let ca = sidecar.path("ca.pem").display().to_string();
    fs::write(sidecar.path("prometheus.yml"), config(&exporters, &url, &ca)).unwrap();
    let prometheus =
        Prometheus::start_with(major, &sidecar.path("prometheus.yml"), &["--enable-feature=native-histograms"]);
    // How many scrapes there were of each exporter, by way.
    let scrapes = |prometheus: &Prometheus| -> BTreeMap<(String, String), f64> {
        let series = prometheus.query("count_over_time(up[1h])").into_iter();
        series
            .map(|(labels, value)| ((labels["exporter"].clone(), labels["way"].clone()), value.parse().unwrap()))
            .collect()
    };
    let before = prometheus.wait_until("three scrapes of each", TIMEOUT, |prometheus| {
        let scrapes = scrapes(prometheus);
        (scrapes.len() == 2 * exporters.len() && scrapes.values().all(|count| *count >= SCRAPES)).then_some(scrapes)
    });
    let requests = |at: usize| -> Vec<usize> {
        let requests = exporters.iter().map(|exporter| exporter.ways[at].1.as_ref());
        requests.map(|requests| requests.map_or(0, |requests| requests.load(Ordering::Relaxed))).collect()
    };
    let (requests, after) = ([requests(0), requests(1)], scrapes(&prometheus));
    let [direct, tunnel] = ["direct", "tunnel"].map(|way| stored(&prometheus, way));
    let mut differ = BTreeSet::new();
    for (number, Exporter { name, .. }) in exporters.iter().enumerate() {
        // Requests a scrape, at least and at most: between the two counts of scrapes there may be more, and one is under way.
        let rate = |way: &str, at: usize| {
            let (key, requests) = (((*name).to_owned(), way.to_owned()), requests[at][number] as f64);
            (requests / (after[&key] + 1.0), requests / before[&key])
        };
        let (directly, through) = (rate("direct", 0), rate("tunnel", 1));
        let is_as_often = directly.0 <= through.1 && through.0 <= directly.1;
        if direct.get(*name) != tunnel.get(*name) || !is_as_often {
            let [direct, tunnel] = [&direct, &tunnel].map(|stored| stored.get(*name));
            println!("{name}: {directly:?} and {through:?} requests a scrape\n{direct:?}\n{tunnel:?}");
            differ.insert(*name);
        }
    }
    let expected: BTreeSet<_> = DIFFERENCES.into_iter().map(|(name, _)| name).collect();
    assert_eq!(differ, expected, "Prometheus {major}: {}", running.log().join("\n"));
}

#[test]
fn prometheus_2_stores_the_same_through_the_tunnel() {
    compare(2);
}

#[test]
fn prometheus_3_stores_the_same_through_the_tunnel() {
    compare(3);
}

/// docs/prometheus.md lists the differences.
#[test]
fn each_difference_has_its_row() {
    let document = include_str!("../../docs/prometheus.md");
    for (name, row) in DIFFERENCES {
        assert!(document.contains(&format!("| {row} |")), "{name}");
    }
}
