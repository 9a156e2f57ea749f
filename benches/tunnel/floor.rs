//! The floor: a bare relay, which does what any proxy between Prometheus and balena's VPN proxy must do, and nothing else. It keeps
//! a TLS connection for each target, as the tunnel does, and for that it reads where an answer ends, by its Content-Length alone.
//! It checks no target and no header, and has no time-outs, no bounds, no metrics and no errors.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use base64::prelude::{BASE64_STANDARD, Engine};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::{KEY, length, print};

type Tunnel = TlsStream<TcpStream>;
type Kept = Arc<Mutex<HashMap<String, Vec<Tunnel>>>>;

pub async fn serve(vpn: SocketAddr, roots: RootCertStore) -> io::Result<()> {
    let tls = TlsConnector::from(Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()));
    let (listener, kept) = (TcpListener::bind("127.0.0.1:0").await?, Kept::default());
    print(&format!("floor on {}", listener.local_addr()?));
    loop {
        let (prometheus, tls, kept) = (listener.accept().await?.0, tls.clone(), kept.clone());
        prometheus.set_nodelay(true)?;
        tokio::spawn(relay(prometheus, vpn, tls, kept));
    }
}

async fn relay(mut prometheus: TcpStream, vpn: SocketAddr, tls: TlsConnector, kept: Kept) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let (head, _) = read_head(&mut prometheus, &mut buffer).await?;
        let request = String::from_utf8_lossy(&buffer[..head]).into_owned();
        let target = request["GET http://".len()..].split('/').next().unwrap_or_default().to_owned();
        let idle = kept.lock().unwrap().get_mut(&target).and_then(Vec::pop);
        let mut tunnel = match idle {
            Some(tunnel) => tunnel,
            None => open(&target, vpn, &tls, &mut buffer).await?,
        };
        tunnel.write_all(request.replacen(&format!("http://{target}"), "", 1).as_bytes()).await?;
        tunnel.flush().await?;
        let (head, mut end) = read_head(&mut tunnel, &mut buffer).await?;
        let mut left = head + length(&buffer[..head]);
        loop {
            prometheus.write_all(&buffer[..end]).await?;
            left -= end;
            if left == 0 {
                break;
            }
            end = tunnel.read(&mut buffer).await?;
            if end == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        kept.lock().unwrap().entry(target).or_default().push(tunnel);
    }
}

async fn open(target: &str, vpn: SocketAddr, tls: &TlsConnector, buffer: &mut [u8]) -> io::Result<Tunnel> {
    let stream = TcpStream::connect(vpn).await?;
    stream.set_nodelay(true)?;
    let mut tunnel = tls.connect(ServerName::try_from("localhost").map_err(io::Error::other)?, stream).await?;
    let user = BASE64_STANDARD.encode(format!("floor:{KEY}"));
    let connect = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Basic {user}\r\n\r\n");
    tunnel.write_all(connect.as_bytes()).await?;
    tunnel.flush().await?;
    read_head(&mut tunnel, buffer).await?;
    print("opened"); // counts as a handshake
    Ok(tunnel)
}

/// The length of a head, and of all that is read with it.
pub async fn read_head(from: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> io::Result<(usize, usize)> {
    let mut end = 0;
    loop {
        match from.read(&mut buffer[end..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => end += length,
        }
        if let Some(head) = buffer[..end].windows(4).position(|four| four == b"\r\n\r\n") {
            return Ok((head + 4, end));
        }
    }
}
