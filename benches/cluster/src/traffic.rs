//! Traffic between containers, and against them. The test's own program, executed in the network namespace of a
//! container (`nsenter`), is the one end or the other: containers need not bring anything for it.
//!
//! [`answer`] echoes TCP and UDP; [`exchange`] compares what comes back with what was sent; [`stream`] goes on while
//! things are broken, and counts; [`forge`] sends what nobody should; [`connections`] is a client outside.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use serde::{Deserialize, Serialize};

use crate::connections;

/// The first argument of a program that shall be one end.
pub const COMMAND: &str = "traffic";

/// Where [`answer`] listens.
pub const PORT: u16 = 7007;

/// How long one exchange may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sizes of the payloads over TCP; around what a packet holds with and without a tunnel, and much.
const TCP_SIZES: [usize; 7] = [1, 1398, 1399, 1448, 1449, 65_536, 1 << 20];

/// Sizes of datagrams: from one byte to those that are sent in fragments. A megabyte is sent as many of them.
const UDP_SIZES: [usize; 6] = [1, 1372, 1373, 1422, 1423, 8000];

/// How many bytes are sent as datagrams of 1,000 bytes.
const UDP_BULK: usize = 1 << 20;

/// What a [`stream`] saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Streamed {
    /// Datagrams or messages that were sent.
    pub sent: u64,
    /// Those whose echo came back.
    pub echoed: u64,
    /// The longest time between two echoes, in milliseconds.
    pub longest_gap_ms: u64,
    /// Why it ended early, if it did.
    pub broken: Option<String>,
}

/// Does what the arguments behind [`COMMAND`] say.
pub fn run(args: &[String]) -> Result<()> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["answer"] => answer(),
        ["exchange", ref to @ ..] => {
            let failures = exchange(to.iter().map(|to| Ok(to.parse()?)).collect::<Result<Vec<_>>>()?);
            println!("{}", serde_json::to_string(&failures)?);
            Ok(())
        }
        ["stream", kind, to, rate] => {
            let streamed = stream(kind, to.parse()?, rate.parse()?)?;
            println!("{}", serde_json::to_string(&streamed)?);
            Ok(())
        }
        ["connects", to] => {
            // Enough for a packet to be sent again: at first after one second.
            let timeout = Duration::from_secs(2);
            println!("{}", TcpStream::connect_timeout(&to.parse()?, timeout).is_ok());
            Ok(())
        }
        ["datagrams", count, ref to @ ..] => {
            let seen = connections::datagrams(count.parse()?, &addresses(to)?)?;
            println!("{}", serde_json::to_string(&seen)?);
            Ok(())
        }
        ["hold", interval, count, ref to @ ..] => {
            let interval = match interval.parse()? {
                0 => None,
                millis => Some(Duration::from_millis(millis)),
            };
            connections::hold(interval, count.parse()?, &addresses(to)?)
        }
        ["forge", from, to] => forge(from.parse()?, to.parse()?),
        ["vxlan", host, from, to] => forged_vxlan(host.parse()?, from.parse()?, to.parse()?),
        _ => bail!("no such traffic: {args:?}"),
    }
}

fn addresses(words: &[&str]) -> Result<Vec<SocketAddr>> {
    words.iter().map(|to| Ok(to.parse()?)).collect()
}

/// Echoes what comes, for ever.
fn answer() -> Result<()> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT));
    let udp = UdpSocket::bind(any)?;
    set_socket_recv_buffer_size_force(&udp, 16 << 20)?;
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            // One that cannot be answered is missed by who sent it.
            let _ = udp.send_to(&buffer[..length], from);
        }
    });
    let tcp = TcpListener::bind(any)?;
    println!("ready");
    for stream in tcp.incoming() {
        let mut stream = stream?;
        std::thread::spawn(move || -> std::io::Result<()> {
            stream.set_nodelay(true)?;
            let mut buffer = vec![0; 65_536];
            loop {
                let length = stream.read(&mut buffer)?;
                if length == 0 {
                    return Ok(());
                }
                stream.write_all(&buffer[..length])?;
            }
        });
    }
    Ok(())
}

fn pattern(size: usize, seed: usize) -> Vec<u8> {
    (0..size)
        .map(|at| (at * 31 + at / 251 + seed).to_le_bytes()[0])
        .collect()
}

/// Exchanges payloads of all sizes with each address, over TCP and UDP: what went wrong, by address.
fn exchange(to: Vec<IpAddr>) -> BTreeMap<String, String> {
    let exchanges = to.into_iter().map(|to| {
        std::thread::spawn(move || {
            let to = SocketAddr::new(to, PORT);
            let result = exchange_tcp(to)
                .context("TCP")
                .and_then(|()| exchange_udp(to).context("UDP"));
            result
                .err()
                .map(|error| (to.ip().to_string(), format!("{error:#}")))
        })
    });
    let exchanges: Vec<_> = exchanges.collect();
    exchanges
        .into_iter()
        .filter_map(|exchange| exchange.join().ok().flatten())
        .collect()
}

fn exchange_tcp(to: SocketAddr) -> Result<()> {
    for size in TCP_SIZES {
        let sent = pattern(size, usize::from(to.port()));
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut writer = stream.try_clone()?;
        let bytes = sent.clone();
        let written = std::thread::spawn(move || writer.write_all(&bytes));
        let mut echoed = vec![0; size];
        stream
            .read_exact(&mut echoed)
            .with_context(|| format!("{size} bytes"))?;
        ensure!(echoed == sent, "{size} bytes came back changed");
        written.join().map_err(|_| anyhow::anyhow!("panicked"))??;
    }
    Ok(())
}

fn udp_to(to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    set_socket_recv_buffer_size_force(&socket, 16 << 20)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn exchange_udp(to: SocketAddr) -> Result<()> {
    let socket = udp_to(to)?;
    let mut buffer = vec![0; 65_536];
    for size in UDP_SIZES {
        let sent = pattern(size, 7);
        socket.send(&sent)?;
        let length = socket
            .recv(&mut buffer)
            .with_context(|| format!("{size} bytes"))?;
        ensure!(buffer[..length] == sent, "{size} bytes came back changed");
    }
    // A window of datagrams under way, so that no buffer runs over.
    let (total, window) = (UDP_BULK.div_ceil(1000), 32);
    let (mut sent, mut echoed) = (0, 0);
    while echoed < total {
        while sent < total && sent - echoed < window {
            socket.send(&pattern(1000, sent))?;
            sent += 1;
        }
        let length = socket
            .recv(&mut buffer)
            .with_context(|| format!("after {echoed} of {total} datagrams"))?;
        ensure!(length == 1000, "a datagram of {length} bytes came back");
        echoed += 1;
    }
    Ok(())
}

/// Sends `rate` numbered messages a second until standard input ends, and counts the echoes.
fn stream(kind: &str, to: SocketAddr, rate: u32) -> Result<Streamed> {
    let ended = Arc::new(AtomicBool::new(false));
    let watch = Arc::clone(&ended);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        watch.store(true, Ordering::Relaxed);
    });
    match kind {
        "tcp" => {
            let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE * 6))?;
            let (mut reader, mut writer) = (stream.try_clone()?, stream);
            streamed(
                rate,
                &ended,
                move |message| writer.write_all(message),
                move |message| reader.read_exact(message),
            )
        }
        "udp" => {
            let socket = Arc::new(udp_to(to)?);
            let sender = Arc::clone(&socket);
            streamed(
                rate,
                &ended,
                move |message| sender.send(message).map(drop),
                move |message| socket.recv(message).map(drop),
            )
        }
        _ => bail!("{kind} is neither tcp nor udp"),
    }
}

fn streamed(
    rate: u32,
    ended: &AtomicBool,
    mut send: impl FnMut(&[u8]) -> std::io::Result<()>,
    mut receive: impl FnMut(&mut [u8]) -> std::io::Result<()> + Send + 'static,
) -> Result<Streamed> {
    #[derive(Default)]
    struct Seen {
        echoed: u64,
        gap: Duration,
        broken: Option<String>,
    }
    println!("ready");
    let seen = Arc::new(Mutex::new(Seen::default()));
    let noted = Arc::clone(&seen);
    // How many are sent in all, once that is known.
    let total = Arc::new(Mutex::new(None::<u64>));
    let goal = Arc::clone(&total);
    let receiver = std::thread::spawn(move || {
        let mut last = Instant::now();
        let mut message = [0; 8];
        loop {
            let result = receive(&mut message);
            let mut seen = noted.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(()) => {
                    seen.echoed += 1;
                    seen.gap = seen.gap.max(last.elapsed());
                    last = Instant::now();
                }
                Err(error) => {
                    seen.broken = Some(error.to_string());
                    return;
                }
            }
            if *goal.lock().unwrap_or_else(PoisonError::into_inner) == Some(seen.echoed) {
                return;
            }
        }
    });
    let (begun, mut sent) = (Instant::now(), 0_u64);
    let mut broken = None;
    while !ended.load(Ordering::Relaxed) {
        let due = Duration::from_secs(1) * u32::try_from(sent)? / rate;
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
        if let Err(error) = send(&sent.to_be_bytes()) {
            broken = Some(error.to_string());
            break;
        }
        sent += 1;
    }
    // One more ends the receiver's wait in any case: it knows the goal before it sees the last echo.
    *total.lock().unwrap_or_else(PoisonError::into_inner) = Some(sent + 1);
    if broken.is_none() {
        send(&sent.to_be_bytes())?;
    }
    let _ = receiver.join();
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Streamed {
        sent: sent + 1,
        echoed: seen.echoed,
        longest_gap_ms: u64::try_from(seen.gap.as_millis())?,
        broken: broken.or_else(|| seen.broken.clone()),
    })
}

/// An IPv4 packet with a UDP datagram in it.
fn packet(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    const PAYLOAD: [u8; 6] = *b"forged";
    /// Its own header and the payload.
    const UDP_LENGTH: u8 = 8 + 6;
    let mut packet = vec![0x45, 0, 0, 20 + UDP_LENGTH, 0, 1, 0, 0, 64, 17, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum: u32 = packet
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let [.., high, low] = (!((sum & 0xffff) + (sum >> 16))).to_be_bytes();
    packet[10..12].copy_from_slice(&[high, low]);
    packet.extend(4000_u16.to_be_bytes());
    packet.extend(PORT.to_be_bytes());
    packet.extend([0, UDP_LENGTH, 0, 0]);
    packet.extend(PAYLOAD);
    packet
}

/// Sends a packet in somebody else's name.
fn forge(from: Ipv4Addr, to: Ipv4Addr) -> Result<()> {
    use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};
    // What is sent through IPPROTO_RAW has its header with it.
    let raw = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW))?;
    let to_address = std::net::SocketAddrV4::new(to, 0);
    sendto(&raw, &packet(from, to), SendFlags::empty(), &to_address)?;
    Ok(())
}

/// Sends a host a packet for one of its containers in a tunnel.
fn forged_vxlan(host: Ipv4Addr, from: Ipv4Addr, to: Ipv4Addr) -> Result<()> {
    /// The VXLAN port of the cluster.
    const VXLAN: u16 = 8472;
    let mut datagram = vec![8, 0, 0, 0, 0, 0, 1, 0];
    datagram.extend([2, 0x66, 0, 0, 0, 1, 2, 0x66, 0, 0, 0, 2, 8, 0]);
    datagram.extend(packet(from, to));
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.send_to(&datagram, (host, VXLAN))?;
    Ok(())
}
