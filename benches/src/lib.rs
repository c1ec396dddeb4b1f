//! Speed, measured beside what a user would pick instead; the measurements lie in `benches/`.
